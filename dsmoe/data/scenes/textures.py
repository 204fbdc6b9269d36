"""The patterns: a weight in [0, 1] of the second colour at each surface point. No colours, no light.

Points are in the solid's own frame (metres). `blur` is the size of a pixel on the surface in metres: edges of
a pattern are ramps that wide, which filters the pattern without changing it between resolutions.
"""

import numpy as np

_GOLDEN = (1 + 5**0.5) / 2
# Six axes of the icosahedron: the twelve dots of a ball lie at their ends.
_DOT_AXES = np.asarray(
    [(0, 1, _GOLDEN), (0, -1, _GOLDEN), (1, _GOLDEN, 0), (-1, _GOLDEN, 0), (_GOLDEN, 0, 1), (_GOLDEN, 0, -1)],
    np.float32,
) / np.float32((1 + _GOLDEN**2) ** 0.5)


def wave(x: np.ndarray, blur) -> np.ndarray:
    """Square wave of period 1 between 0 and 1 with ramps `blur` wide (in periods)."""
    saw = np.abs(x - np.floor(x) - 0.5) - 0.25
    return ramp(saw, blur)


def ramp(x: np.ndarray, blur) -> np.ndarray:
    """0 below -blur/2, 1 above blur/2, linear between."""
    return np.clip(x / blur + 0.5, 0.0, 1.0)


def weight(texture: str, p, part, half, count: float, phase: float, blur: float) -> np.ndarray:
    """Weight of the second colour, float32 [N], at points p [3, N] on faces part [N]; count: repeats."""
    return _PATTERNS[texture](p, part, half, count, phase, blur)


def _plain(p, part, half, count, phase, blur):
    return np.zeros(p[0].shape, np.float32)


def _bands(p, part, half, count, phase, blur):
    repeats = count / (2 * half[1])
    return wave(p[1] * repeats + phase, blur * repeats)


def _gradient(p, part, half, count, phase, blur):
    return np.clip(p[1] * (0.55 / half[1]) + 0.5, 0.0, 1.0)


def _halves(p, part, half, count, phase, blur):
    return ramp(p[1] + (phase - 0.5) * 0.2, blur)


def _upright(p, part, half, count, phase, blur):
    turn = np.arctan2(p[2], p[0]) * (1 / (2 * np.pi))
    repeats = 2 * round(count)
    return wave(turn * repeats + phase, blur * repeats / (2 * np.pi * half[0])) * (part != 6)


def _sectors(p, part, half, count, phase, blur):
    turn = np.arctan2(p[1], p[0]) * (1 / (2 * np.pi))
    repeats = round(count)
    return wave(turn * repeats + phase, blur * repeats / (2 * np.pi * 0.7 * half[0]))


def _rings(p, part, half, count, phase, blur):
    repeats = count / (2 * half[0])
    distance = np.sqrt(p[0] * p[0] + p[1] * p[1])
    return wave(distance * repeats + 0.25, blur * repeats) * (part != 0)


def _zigzag(p, part, half, count, phase, blur):
    turn = np.arctan2(p[2], p[0]) * (8 / (2 * np.pi)) + phase
    tooth = np.abs(turn - np.floor(turn) - 0.5)
    repeats = count / (2 * half[1])
    return wave(p[1] * repeats + tooth * 0.8, 1.6 * blur * repeats)


def _marble(p, part, half, count, phase, blur):
    bend = np.sin(p[0] * 9.0 + 6.3 * phase) + np.sin(p[2] * 9.0 - 4.0 * phase)
    vein = np.sin(p[1] * (3.0 * count) + 1.6 * bend + 2.0 * p[0])
    return 0.5 + 0.5 * vein * np.abs(vein)


def _face_plane(p, part):
    """The two coordinates within a face of the box, whose faces are numbered x, x, y, y, z, z."""
    u = np.where(part < 2, p[2], p[0])
    v = np.where((part == 2) | (part == 3), p[2], p[1])
    return u, v


def _checker(p, part, half, count, phase, blur):
    u, v = _face_plane(p, part)
    repeats = round(count) / (4 * half[0])
    offset = 0.25 if round(count) % 2 == 0 else 0.0
    a = wave(u * repeats + offset, blur * repeats)
    b = wave(v * repeats + offset, blur * repeats)
    return a + b - 2.0 * a * b


def _face_dots(p, part, half, count, phase, blur):
    u, v = _face_plane(p, part)
    repeats = round(count) / (2 * half[0])
    shift = 0.5 * (round(count) % 2)
    u, v = u * repeats + shift, v * repeats + shift
    u, v = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
    return ramp(0.30 - np.sqrt(u * u + v * v), blur * repeats)


def _sphere_dots(p, part, half, count, phase, blur):
    along = np.abs(_DOT_AXES @ np.asarray(p)).max(0) * (1 / half[0])
    size = 0.30 + 0.02 * count
    return ramp(along - (1 - size * size / 2), blur / half[0] * size)


def _cone_dots(p, part, half, count, phase, blur):
    row = p[1] * (count / (2 * half[1])) + phase
    level = np.floor(row)
    turn = np.arctan2(p[2], p[0]) * (6 / (2 * np.pi)) + 0.5 * level
    height = (row - level - 0.5) * (2 * half[1] / count)
    across = (turn - np.floor(turn) - 0.5) * np.sqrt(p[0] * p[0] + p[2] * p[2]) * (2 * np.pi / 6)
    return ramp(0.075 - np.sqrt(height * height + across * across), blur)


def _bricks(p, part, half, count, phase, blur):
    row = p[1] * (count / (2 * half[1])) + 0.5 * (round(count) % 2)
    level = np.floor(row)
    across = np.where(part < 2, p[2], p[0]) * (count / (3.2 * half[0])) + 0.5 * level + phase
    bed = 0.5 - np.abs(row - level - 0.5)
    joint = 0.5 - np.abs(across - np.floor(across) - 0.5)
    blur = blur * count / (2 * half[1])
    return np.maximum(ramp(0.10 - bed, blur), ramp(0.055 - joint, blur))


_PATTERNS = {
    "plain": _plain,
    "bands": _bands,
    "gradient": _gradient,
    "halves": _halves,
    "upright": _upright,
    "sectors": _sectors,
    "rings": _rings,
    "zigzag": _zigzag,
    "marble": _marble,
    "checker": _checker,
    "face_dots": _face_dots,
    "sphere_dots": _sphere_dots,
    "cone_dots": _cone_dots,
    "bricks": _bricks,
}

# Repeats of each pattern over the solid, as a range to draw from.
COUNTS: dict[str, tuple[float, float]] = {
    "bands": (3.0, 4.2),
    "upright": (3.6, 5.4),
    "sectors": (4.6, 7.4),
    "rings": (4.6, 5.4),
    "zigzag": (2.6, 3.6),
    "marble": (2.6, 4.4),
    "checker": (2.6, 4.4),
    "face_dots": (1.6, 3.4),
    "sphere_dots": (0.0, 5.0),
    "cone_dots": (3.2, 4.4),
    "bricks": (4.6, 6.4),
}
