"""One scene as numbers, drawn from its index by a counter-based generator. Nothing here makes pixels.

World frame: x right, y down, z away from the first camera; the ground is y = 0, the back wall is a plane of
constant z, the main object stands at the origin. Lengths in metres.
"""

import colorsys
import math
from dataclasses import dataclass

import numpy as np

from dsmoe.data.scenes.catalogue import FACING, HALF_EXTENTS, KINDS
from dsmoe.data.scenes.textures import COUNTS

_STREAM = 0x5CE9E5  # second word of the Philox key: this data set
_WORDS = 96  # draws of one scene, in four blocks of 24
_OCCLUDER_SHARE = 0.35
_OCCLUDER_SHAPES = ("sphere", "box", "cylinder", "cone", "egg", "capsule", "prism", "bucket", "gem")
_OCCLUDER_TEXTURES = ("plain", "gradient", "plain", "halves")
GROUNDS = ("plain", "tiles", "planks", "patches")
WALLS = ("plain", "clouds", "panels")

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Solid:
    """An object: local point p lies at rotation @ p + centre in frame 1 and at that + motion in frame 2."""

    shape: str
    half: tuple[float, float, float]
    rotation: np.ndarray
    centre: np.ndarray
    motion: np.ndarray
    texture: str
    count: float
    phase: float
    first: Colour
    second: Colour


@dataclass(frozen=True)
class Camera:
    """Pinhole: world direction = rotation @ (x, y, 1), x right and y down; focal in image sides."""

    rotation: np.ndarray
    position: np.ndarray
    focal: float


@dataclass(frozen=True)
class Backdrop:
    """Ground and back wall: pattern name and two colours each; cell: pattern size in metres."""

    wall_z: float
    ground: tuple[str, Colour, Colour]
    wall: tuple[str, Colour, Colour]
    cell: float
    turn: float
    phases: tuple[float, float]
    contrast: float


@dataclass(frozen=True)
class Scene:
    """Everything a renderer needs; solids[0] is the main object, light the unit vector to the sun."""

    label: int
    cameras: tuple[Camera, Camera]
    solids: tuple[Solid, ...]
    backdrop: Backdrop
    light: np.ndarray
    ambient: float


class _Draws:
    """Uniform numbers read one after another from a fixed block."""

    def __init__(self, values: list[float]) -> None:
        self._values = iter(values)

    def unit(self) -> float:
        return next(self._values)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._values)

    def spread(self, size: float) -> float:
        return size * (2.0 * next(self._values) - 1.0)

    def choose(self, options):
        return options[int(next(self._values) * len(options))]


def label_of(index: int) -> int:
    """Class of a scene. Each aligned block of sixteen indices holds every class once, rotated by a hash."""
    block = (index >> 4) & 0xFFFFFFFFFFFFFFFF
    mixed = (block ^ (block >> 31)) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    return ((index & 15) + (mixed >> 60)) & 15


def draw(index: int) -> Scene:
    """The scene of an index >= 0: a pure function, the same in any order and process."""
    words = np.random.Philox(key=np.array([index, _STREAM], np.uint64)).random_raw(_WORDS)
    values = ((words >> np.uint64(40)).astype(np.float64) * 2.0**-24).tolist()
    view, main, other, back = (_Draws(values[k : k + 24]) for k in range(0, _WORDS, 24))
    label = label_of(index)
    azimuth, elevation = view.spread(1.15), view.between(0.55, 1.05)
    level = math.cos(elevation)
    light = np.array([math.sin(azimuth) * level, -math.sin(elevation), -math.cos(azimuth) * level])
    solid = _main(main, label)
    solids = [solid]
    if other.unit() < _OCCLUDER_SHARE:
        solids.append(_occluder(other, solid))
    ambient = view.between(0.42, 0.58)
    return Scene(label, _cameras(view, solid), tuple(solids), _backdrop(back), light, ambient)


def _turn(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


def _tilt(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def _roll(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _colour(hue: float, saturation: float, value: float) -> Colour:
    return colorsys.hsv_to_rgb((hue / 360.0) % 1.0, min(saturation, 1.0), min(value, 1.0))


def _second_colour(d: _Draws, style: str, hue: float, saturation: float, value: float) -> Colour:
    a, b = d.unit(), d.unit()
    if style == "light":
        return _colour(hue + 60 * (a - 0.5), 0.12 * b, 0.90 + 0.10 * a)
    if style == "dark":
        return _colour(hue, 0.4 * b, 0.10 + 0.14 * a)
    if style == "contrast":
        return _colour(hue + 130 + 100 * a, 0.35 + 0.5 * b, 0.85 + 0.15 * a)
    return _colour(hue + 40 + 50 * a, saturation, value * (0.35 + 0.2 * b))


def _motion(d: _Draws, size: float) -> np.ndarray:
    """Translation along the ground from frame 1 to frame 2; half of the objects stand still."""
    moves, angle, length = d.unit() < 0.5, d.spread(math.pi), d.between(0.3, 1.0) * size
    return np.array([math.cos(angle), 0.0, math.sin(angle)]) * (length if moves else 0.0)


def _main(d: _Draws, label: int) -> Solid:
    kind = KINDS[label]
    width, height = 1.0 + d.spread(0.08), 1.0 + d.spread(0.10)
    a, b, c = HALF_EXTENTS[kind.shape]
    if kind.shape in ("sphere", "disc", "torus"):  # these stay round as seen from the front
        height = width
    half = (a * width, b * height, c * width)
    yaw = d.spread(math.radians(FACING.get(kind.shape, 180.0)))
    rotation = _turn(yaw)
    lean, side = d.spread(0.6), d.spread(0.6)
    if kind.shape == "sphere":
        rotation = rotation @ _tilt(lean) @ _roll(side)
    hue = kind.hue + kind.spread * (d.unit() + d.unit() - 1.0)
    saturation, value = d.between(*kind.saturation), d.between(*kind.value)
    return Solid(
        shape=kind.shape,
        half=half,
        rotation=rotation,
        centre=np.array([0.0, -half[1], 0.0]),
        motion=_motion(d, 0.16),
        texture=kind.texture,
        count=d.between(*COUNTS.get(kind.texture, (1.0, 1.0))),
        phase=d.unit(),
        first=_colour(hue, saturation, value),
        second=_second_colour(d, kind.second, hue, saturation, value),
    )


def _occluder(d: _Draws, main: Solid) -> Solid:
    """A smaller object of another shape, plainly painted, in front of or beside the main one."""
    shape = d.choose([s for s in _OCCLUDER_SHAPES if s != main.shape])
    scale = d.between(0.45, 0.62)
    half = tuple(scale * h for h in HALF_EXTENTS[shape])
    away = max(main.half[0], main.half[2]) * 1.05 + max(half[0], half[2]) + d.between(0.02, 0.15)
    angle = d.spread(0.70)
    hue, saturation, value = 360.0 * d.unit(), d.between(0.2, 0.9), d.between(0.35, 0.9)
    return Solid(
        shape=shape,
        half=half,
        rotation=_turn(d.spread(math.pi)),
        centre=np.array([math.sin(angle) * away, -half[1], -math.cos(angle) * away]),
        motion=_motion(d, 0.16),
        texture=d.choose(_OCCLUDER_TEXTURES),
        count=1.0,
        phase=d.unit(),
        first=_colour(hue, saturation, value),
        second=_second_colour(d, "near", hue, saturation, value),
    )


def _cameras(d: _Draws, main: Solid) -> tuple[Camera, Camera]:
    """The first looks at the main object, which fills 38 to 62 % of the side; the second is nearby."""
    focal = d.between(1.1, 1.5)
    share = d.between(0.38, 0.62)
    size = 2.0 * max(main.half[0], main.half[1])
    distance = focal * size / share
    pitch = d.between(0.14, 0.46)
    target = main.centre + np.array([d.spread(0.07), d.spread(0.06), 0.0]) * (size / share)
    position = target - distance * np.array([0.0, math.sin(pitch), math.cos(pitch)])
    position[1] = min(position[1], -0.12)
    rotation = _tilt(-pitch) @ _roll(d.spread(0.05))
    first = Camera(rotation, position, focal)
    step = np.array([d.spread(0.10), d.spread(0.05), d.spread(0.10)]) * distance * 0.8
    change = _turn(d.spread(0.035)) @ _tilt(d.spread(0.025)) @ _roll(d.spread(0.03))
    moved = position + rotation @ step
    moved[1] = min(moved[1], -0.10)
    return first, Camera(rotation @ change, moved, focal)


def _backdrop(d: _Draws) -> Backdrop:
    ground_hue, wall_hue = 360.0 * d.unit(), 360.0 * d.unit()
    ground_value, wall_value = d.between(0.35, 0.80), d.between(0.55, 0.95)
    ground_saturation, wall_saturation = d.between(0.05, 0.40), d.between(0.05, 0.45)
    lift = d.between(0.60, 0.85)
    ground = (
        d.choose(GROUNDS),
        _colour(ground_hue, ground_saturation, ground_value),
        _colour(ground_hue + d.spread(40), ground_saturation, ground_value * lift),
    )
    wall = (
        d.choose(WALLS),
        _colour(wall_hue, wall_saturation, wall_value),
        _colour(wall_hue + d.spread(50), wall_saturation * 0.6, min(1.0, wall_value * d.between(0.75, 1.25))),
    )
    return Backdrop(
        wall_z=d.between(2.5, 6.0),
        ground=ground,
        wall=wall,
        cell=d.between(0.6, 1.1),
        turn=d.spread(math.pi),
        phases=(d.unit(), d.unit()),
        contrast=d.between(0.4, 0.9),
    )
