"""Ray intersection with the solids, in a solid's own frame (origin at its middle, y down, metres).

A ray is o + t d with d scaled so that its component along the optical axis is one: t is the z-depth.
The origin is outside every solid and the same for all rays; `t` is +inf where a ray misses.
Shading and patterns live elsewhere.
"""

from functools import cache

import numpy as np

BUCKET_TOP, BUCKET_BOTTOM = 1.0, 0.66  # radius at the rim and at the foot, as a share of the half width
_TORUS_STEPS = 28
_TORUS_HIT = 5e-4  # metres: rays that come closer than this count as hits


def intersect(shape: str, half: tuple[float, float, float], o, d) -> tuple[np.ndarray, np.ndarray]:
    """Depth t float32 [N] (+inf: miss) and part int8 [N] (face number) of rays o [3], d float32 [3, N]."""
    if shape in ("sphere", "egg"):
        return _ellipsoid(half, o, d)
    if shape in ("cylinder", "column", "cone", "bucket"):
        return _frustum(*frustum_profile(shape, half), half[1], o, d)
    if shape == "disc":  # a cylinder whose axis is z
        return _frustum(half[0], 0.0, half[2], (o[0], o[2], o[1]), (d[0], d[2], d[1]))
    if shape == "capsule":
        return _capsule(half, o, d)
    if shape == "torus":
        return _torus(half[0] - half[2], half[2], o, d)
    normals, offsets = polyhedron(shape, half)
    return _convex(normals, offsets, o, d)


def normal_dot(shape: str, half: tuple[float, float, float], p, part, light) -> np.ndarray:
    """Outward unit normal at the surface points p [3, N] times the vector light [3]: float32 [N]."""
    x, y, z = p
    lx, ly, lz = light
    if shape in ("sphere", "egg"):
        nx, ny, nz = x / half[0] ** 2, y / half[1] ** 2, z / half[2] ** 2
        return (nx * lx + ny * ly + nz * lz) / np.sqrt(nx * nx + ny * ny + nz * nz)
    if shape in ("cylinder", "column", "cone", "bucket"):
        middle, slope = frustum_profile(shape, half)
        radius = np.maximum(middle + slope * y, 1e-6)
        side = ((x * lx + z * lz) / radius - slope * ly) * (1.0 + slope * slope) ** -0.5
        return np.where(part == 0, side, np.where(part == 1, -ly, ly))
    if shape == "disc":
        return np.where(part == 0, (x * lx + y * ly) / half[0], np.where(part == 1, -lz, lz))
    if shape == "capsule":
        r, h = half[0], half[1] - half[0]
        return (x * lx + (y - np.clip(y, -h, h)) * ly + z * lz) / r
    if shape == "torus":
        big, small = half[0] - half[2], half[2]
        ring = 1.0 - big / np.sqrt(x * x + y * y)
        return (x * ring * lx + y * ring * ly + z * lz) / small
    normals, _ = polyhedron(shape, half)
    return (normals @ np.asarray(light, np.float32))[part]


def frustum_profile(shape: str, half: tuple[float, float, float]) -> tuple[float, float]:
    """(radius at mid height, its slope along y) of a round solid that stands upright."""
    if shape == "cone":
        return half[0] / 2, half[0] / (2 * half[1])
    if shape == "bucket":
        top, foot = half[0] * BUCKET_TOP, half[0] * BUCKET_BOTTOM
        return (top + foot) / 2, (foot - top) / (2 * half[1])
    return half[0], 0.0


@cache
def _unit_faces(shape: str) -> np.ndarray:
    """Outward normals [K, 3] (before scaling by the half extents) with offset 1 after scaling; K faces."""
    if shape == "box":
        faces = [(1, 0, 0), (-1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, 1), (0, 0, -1)]
    elif shape == "gem":  # octahedron |x| + |y| + |z| <= 1
        faces = [(sx, sy, sz) for sx in (1, -1) for sy in (1, -1) for sz in (1, -1)]
    elif shape == "pyramid":  # apex at y = -1, square foot at y = 1: |x|, |z| <= (1 + y) / 2
        faces = [(2, -1, 0), (-2, -1, 0), (0, -1, 2), (0, -1, -2), (0, 1, 0)]
    elif shape == "prism":  # hexagon with corners on the unit circle
        inner = np.cos(np.pi / 6)
        turns = np.arange(6) * np.pi / 3
        faces = [(np.cos(a) / inner, 0, np.sin(a) / inner) for a in turns] + [(0, -1, 0), (0, 1, 0)]
    else:
        raise AssertionError(shape)
    return np.asarray(faces, np.float64)


def polyhedron(shape: str, half: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Unit outward normals float32 [K, 3] and offsets float32 [K]: the solid is normals @ p <= offsets."""
    faces = _unit_faces(shape) / np.asarray(half)
    length = np.sqrt((faces * faces).sum(1))
    return (faces / length[:, None]).astype(np.float32), (1.0 / length).astype(np.float32)


def _convex(normals, offsets, o, d):
    """The ray enters at the last of the faces that o is outside of, if that is before it leaves any other.

    Inverse depths make this one matrix product, and a face that is met behind o gets a negative one.
    """
    room = offsets - normals @ np.asarray(o, np.float32)
    room = np.where(np.abs(room) < 1e-6, np.float32(1e-6), room)  # o within the plane of a face
    inverse = (normals / room[:, None]) @ np.asarray(d)
    outside = room < 0
    front, back = inverse[outside], inverse[~outside]
    part = front.argmin(0)
    entry = front.min(0)
    hit = entry > np.maximum(back.max(0), 0.0)
    t = np.where(hit, 1.0 / entry, np.float32(np.inf))
    return t, np.flatnonzero(outside).astype(np.int8)[part]


def _closest(o, dx, dy, dz):
    """|d|^2, depth of the ray's point nearest to the origin, its squared distance.

    This form keeps float32 exact where b^2 - a c of the quadratic would cancel.
    """
    ox, oy, oz = o
    a = dx * dx + dy * dy + dz * dz
    t = (dx * -ox + dy * -oy + dz * -oz) / a
    qx, qy, qz = ox + t * dx, oy + t * dy, oz + t * dz
    return a, t, qx * qx + qy * qy + qz * qz


def _ellipsoid(half, o, d):
    scaled = [d[i] * (1.0 / half[i]) for i in range(3)]
    a, t, square = _closest([o[i] / half[i] for i in range(3)], *scaled)
    inside = 1.0 - square
    t = np.where(inside > 0, t - np.sqrt(np.maximum(inside, 0.0) / a), np.float32(np.inf))
    return t, np.zeros(t.shape, np.int8)


def _frustum(middle, slope, h, o, d):
    """x^2 + z^2 = (middle + slope y)^2 for |y| <= h with flat ends; part 0 side, 1 end at -h, 2 end at +h."""
    ox, oy, oz = o
    dx, dy, dz = d
    inf = np.float32(np.inf)
    a = dx * dx + dz * dz - (slope * slope) * (dy * dy)
    b = dx * ox + dz * oz - dy * (slope * (middle + slope * oy))
    c = ox * ox + oz * oz - (middle + slope * oy) ** 2
    root = b * b - a * c
    real = root >= 0
    root = np.sqrt(np.maximum(root, 0.0))
    a = np.where(np.abs(a) < 1e-6, np.float32(1e-6), a)
    t = (-b - root) / a
    t = np.where(real & (np.abs(oy + t * dy) <= h) & (t > 0), t, inf)
    if slope:  # the inside of a double cone is not convex: the other root may come first
        other = (root - b) / a
        t = np.minimum(t, np.where(real & (np.abs(oy + other * dy) <= h) & (other > 0), other, inf))
    part = np.zeros(t.shape, np.int8)
    if abs(oy) > h:
        end = h if oy > 0 else -h
        radius = middle + slope * end
        if radius > 1e-6:
            with np.errstate(divide="ignore", invalid="ignore"):
                cap = (end - oy) / dy
                x, z = ox + cap * dx, oz + cap * dz
                on = (x * x + z * z <= radius * radius) & (cap > 0) & (cap < t)
            t = np.where(on, cap, t)
            part[on] = 2 if oy > 0 else 1
    return t, part


def _capsule(half, o, d):
    r, h = half[0], half[1] - half[0]
    t, part = _frustum(r, 0.0, h, o, d)
    part[:] = 0
    for middle in (-h, h):
        ball, _ = _ellipsoid((r, r, r), (o[0], o[1] - middle, o[2]), d)
        np.minimum(t, ball, out=t)
    return t, part


def _torus(big, small, o, d):
    """Sphere tracing on the exact distance, then one Newton step. Axis z."""
    dx, dy, dz = d
    ox, oy, oz = o
    a, middle, square = _closest(o, dx, dy, dz)
    reach = (big + small) ** 2
    part = np.zeros(a.shape, np.int8)
    result = np.full(a.shape, np.inf, np.float32)
    near = np.flatnonzero(square < reach)
    if not near.size:
        return result, part
    dx, dy, dz, a, middle, square = (v[near] for v in (dx, dy, dz, a, middle, square))
    span = np.sqrt((reach - square) / a)
    step = 1.0 / np.sqrt(a)
    t, last = middle - span, middle + span
    for _ in range(_TORUS_STEPS):
        x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
        ring = np.sqrt(x * x + y * y) - big
        distance = np.sqrt(ring * ring + z * z) - small
        t += distance * step
    hit = (distance < _TORUS_HIT) & (t < last)
    x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
    flat = np.sqrt(x * x + y * y)
    ring = flat - big
    tube = np.sqrt(ring * ring + z * z)
    slope = ((x * dx + y * dy) * (ring / flat) + z * dz) / tube
    t -= np.where(slope * step < -0.05, (tube - small) / np.minimum(slope, -1e-3), 0.0)
    result[near[hit]] = t[hit]
    return result, part
