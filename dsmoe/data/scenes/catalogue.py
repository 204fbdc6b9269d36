"""The sixteen kinds of thing: shape, pattern and loose palette. Nothing here draws or renders."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One class. Hue in degrees with a half-width of jitter; saturation and value as ranges in [0, 1].

    second: how the pattern's other colour is made: "light" (near white), "dark" (near black),
    "contrast" (another hue), "near" (the same hue, shifted and darkened).
    """

    name: str
    shape: str
    texture: str
    hue: float
    spread: float
    saturation: tuple[float, float]
    value: tuple[float, float]
    second: str


KINDS: tuple[Kind, ...] = (
    Kind("striped_ball", "sphere", "bands", 0, 45, (0.65, 0.95), (0.70, 0.95), "light"),
    Kind("dotted_ball", "sphere", "sphere_dots", 205, 50, (0.55, 0.90), (0.55, 0.90), "contrast"),
    Kind("checker_cube", "box", "checker", 30, 50, (0.55, 0.90), (0.70, 0.95), "dark"),
    Kind("dotted_cube", "box", "face_dots", 330, 50, (0.50, 0.90), (0.60, 0.90), "light"),
    Kind("ringed_barrel", "cylinder", "bands", 28, 40, (0.45, 0.80), (0.55, 0.85), "dark"),
    Kind("marbled_column", "column", "marble", 60, 90, (0.15, 0.45), (0.75, 0.95), "near"),
    Kind("striped_cone", "cone", "bands", 20, 40, (0.75, 0.95), (0.80, 1.00), "light"),
    Kind("dotted_cone", "cone", "cone_dots", 285, 55, (0.50, 0.85), (0.55, 0.85), "light"),
    Kind("brick_pyramid", "pyramid", "bricks", 30, 40, (0.45, 0.75), (0.60, 0.90), "light"),
    Kind("plain_gem", "gem", "plain", 155, 80, (0.55, 0.95), (0.65, 0.95), "near"),
    Kind("target_disc", "disc", "rings", 350, 50, (0.65, 0.95), (0.65, 0.95), "light"),
    Kind("zigzag_egg", "egg", "zigzag", 110, 70, (0.45, 0.85), (0.65, 0.95), "contrast"),
    Kind("banded_torus", "torus", "sectors", 50, 60, (0.60, 0.95), (0.70, 0.95), "light"),
    Kind("two_tone_capsule", "capsule", "halves", 225, 70, (0.50, 0.90), (0.55, 0.90), "contrast"),
    Kind("striped_prism", "prism", "upright", 255, 70, (0.45, 0.85), (0.55, 0.90), "light"),
    Kind("gradient_bucket", "bucket", "gradient", 180, 70, (0.50, 0.90), (0.70, 0.95), "near"),
)

# Half extents (x, y, z) in metres of each shape before jitter; y points down, the largest side is about 1 m.
HALF_EXTENTS: dict[str, tuple[float, float, float]] = {
    "sphere": (0.50, 0.50, 0.50),
    "box": (0.40, 0.40, 0.40),
    "cylinder": (0.42, 0.42, 0.42),
    "column": (0.29, 0.60, 0.29),
    "cone": (0.46, 0.55, 0.46),
    "pyramid": (0.50, 0.42, 0.50),
    "gem": (0.48, 0.58, 0.48),
    "disc": (0.52, 0.52, 0.13),
    "egg": (0.40, 0.54, 0.40),
    "torus": (0.54, 0.54, 0.16),
    "capsule": (0.31, 0.60, 0.31),
    "prism": (0.40, 0.50, 0.40),
    "bucket": (0.46, 0.44, 0.46),
}

# Shapes that are flat: they are turned towards the camera within this many degrees, all others freely.
FACING: dict[str, float] = {"disc": 42.0, "torus": 42.0}
