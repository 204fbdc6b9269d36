"""From a scene to pixels: images, depth, optical flow and masks at one resolution. No random numbers here.

Pixel (row, column) has its centre at image coordinates (u, v) = (column, row); the intrinsics are
focal_px = focal * side and cx = cy = (side - 1) / 2, so the same scene is seen at every resolution.
"""

import math

import numpy as np

from dsmoe.data.scenes.geometry import intersect, normal_dot
from dsmoe.data.scenes.scene import Backdrop, Camera, Scene, Solid
from dsmoe.data.scenes.textures import ramp, wave, weight

WALL, GROUND = 0, 1  # parts of the backdrop; object k has the parts 16 (k + 1) .. 16 (k + 1) + 15
_OBJECT = 16
# Four extra rays (a rotated grid, in pixels) at every pixel that touches an outline.
_SUB = np.array([(-0.125, -0.375), (0.375, -0.125), (0.125, 0.375), (-0.375, 0.125)], np.float32)


class Renderer:
    """Renders scenes at one resolution (side in pixels); holds the pixel grid and nothing else."""

    def __init__(self, side: int) -> None:
        self.side = side
        self._axis = ((np.arange(side) + 0.5) / side - 0.5).astype(np.float32)
        self._pixels = np.arange(side * side, dtype=np.int32).reshape(side, side)

    def image(self, scene: Scene, frame: int = 0) -> np.ndarray:
        """uint8 [side, side, 3] of frame 0 or 1."""
        return self.layers(scene, frame)[0]

    def layers(self, scene: Scene, frame: int):
        """(image uint8 [H, W, 3], depth float32 [H, W], part int8 [H, W], amodal bool [H, W] of solid 0)."""
        side = self.side
        camera = scene.cameras[frame]
        rgb, depth, part = _shade_backdrop(scene, frame, self._grid(camera.rotation, camera.focal), side)
        amodal = None
        for k, solid in enumerate(scene.solids):
            centre = solid.centre + solid.motion * frame
            rows, columns = self._window(solid, centre, camera)
            t, hit_part, origin, d = self._trace(solid, centre, camera, rows, columns)
            pixels = self._pixels[rows, columns].reshape(-1)
            if k == 0:
                amodal = np.zeros(side * side, bool)
                amodal[pixels] = t < np.inf
            near = np.flatnonzero(t < depth[pixels])
            target = pixels[near]
            t, hit_part = t[near], hit_part[near]
            blur = self._blur(t, camera)
            rgb[:, target] = _shade_solid(scene, solid, blur, origin, d[:, near], t, hit_part)
            depth[target] = t
            part[target] = hit_part + np.int8(_OBJECT * (k + 1))
        part = part.reshape(side, side)
        self._smooth(scene, frame, rgb, part)
        image = np.empty((side, side, 3), np.uint8)
        image[...] = (np.minimum(rgb, 1.0) * 255.0 + 0.5).reshape(3, side, side).transpose(1, 2, 0)
        return image, depth.reshape(side, side), part, amodal.reshape(side, side)

    def flow(self, scene: Scene, depth: np.ndarray, part: np.ndarray) -> np.ndarray:
        """float32 [H, W, 2] in pixels: way of the surface point seen at each pixel of frame 0 to frame 1."""
        first, second = scene.cameras
        turn = second.rotation.T @ first.rotation
        shifts = [second.rotation.T @ (first.position - second.position)] * 2
        shifts += [shifts[0] + second.rotation.T @ solid.motion for solid in scene.solids]
        owner = np.where(part < _OBJECT, 0, part // _OBJECT + 1)
        shift = np.asarray(shifts)[owner]
        x = (self._axis / first.focal).astype(np.float64)
        rays = np.stack(np.broadcast_arrays(x[None, :], x[:, None], np.float64(1.0)), -1)
        seen = (rays @ turn.T) * depth[..., None] + shift
        moved = seen[..., :2] / seen[..., 2:] * second.focal
        start = rays[..., :2] * first.focal
        return ((moved - start) * self.side).astype(np.float32)

    def _grid(self, matrix: np.ndarray, focal: float, rows=slice(None), columns=slice(None)) -> np.ndarray:
        """Directions matrix @ (x, y, 1) of the pixels in a window: float32 [3, n]."""
        m = matrix.astype(np.float32)
        across = m[:, 0:1] * (self._axis[columns] / np.float32(focal))
        down = m[:, 1:2] * (self._axis[rows] / np.float32(focal)) + m[:, 2:3]
        return (across[:, None, :] + down[:, :, None]).reshape(3, -1)

    def _trace(self, solid: Solid, centre, camera: Camera, rows, columns):
        local = solid.rotation.T
        origin = (local @ (camera.position - centre)).tolist()
        d = self._grid(local @ camera.rotation, camera.focal, rows, columns)
        t, part = intersect(solid.shape, solid.half, origin, d)
        return t, part, origin, d

    def _blur(self, t: np.ndarray, camera: Camera) -> float:
        """Size of a pixel on the surface in metres (one number per object), widened a little for slant."""
        return 1.3 * float(t.mean()) / (camera.focal * self.side) if t.size else 1.0

    def _window(self, solid: Solid, centre, camera: Camera) -> tuple[slice, slice]:
        """Rows and columns that contain the projection of the solid's bounding box."""
        corners = (_CORNERS * np.asarray(solid.half)) @ (camera.rotation.T @ solid.rotation).T
        corners += camera.rotation.T @ (centre - camera.position)
        scale = camera.focal * self.side
        image = corners[:, :2] / corners[:, 2:] * scale + (self.side - 1) / 2
        low = np.clip(np.floor(image.min(0)), 0, self.side).astype(int).tolist()
        high = np.clip(np.ceil(image.max(0)) + 1, 0, self.side).astype(int).tolist()
        return slice(low[1], high[1]), slice(low[0], high[0])

    def _smooth(self, scene: Scene, frame: int, rgb: np.ndarray, part: np.ndarray) -> None:
        """Anti-aliasing: pixels whose neighbour shows another part get the mean of four rays."""
        edge = np.zeros(part.shape, bool)
        differs = part[:, 1:] != part[:, :-1]
        edge[:, 1:] |= differs
        edge[:, :-1] |= differs
        differs = part[1:] != part[:-1]
        edge[1:] |= differs
        edge[:-1] |= differs
        pixels = np.flatnonzero(edge)
        if not pixels.size:
            return
        camera = scene.cameras[frame]
        rows, columns = np.divmod(pixels, self.side)
        scale = np.float32(1.0 / (self.side * camera.focal))
        rays = np.ones((3, 4, pixels.size), np.float32)
        middle = np.float32((self.side - 1) / 2)
        rays[0] = (columns.astype(np.float32) - middle + _SUB[:, :1]) * scale
        rays[1] = (rows.astype(np.float32) - middle + _SUB[:, 1:]) * scale
        rays = rays.reshape(3, -1)
        d = camera.rotation.astype(np.float32) @ rays
        colour, depth, _ = _shade_backdrop(scene, frame, d, self.side)
        for solid in scene.solids:
            centre = solid.centre + solid.motion * frame
            local = solid.rotation.T
            origin = (local @ (camera.position - centre)).tolist()
            d = (local @ camera.rotation).astype(np.float32) @ rays
            t, hit_part = intersect(solid.shape, solid.half, origin, d)
            near = np.flatnonzero(t < depth)
            t = t[near]
            depth[near] = t
            colour[:, near] = _shade_solid(scene, solid, self._blur(t, camera), origin, d[:, near], t, hit_part[near])
        rgb[:, pixels] = colour.reshape(3, 4, -1).mean(1)


_CORNERS = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float64)


def _mix(first, second, w: np.ndarray, light=None) -> np.ndarray:
    """(first + (second - first) w) light, as float32 [3, n]."""
    a = np.asarray(first, np.float32)[:, None]
    b = np.asarray(second, np.float32)[:, None] - a
    out = b * w
    out += a
    if light is not None:
        out *= light
    return out


def _shade_solid(scene: Scene, solid: Solid, blur: float, origin, d, t, part) -> np.ndarray:
    p = [origin[k] + t * d[k] for k in range(3)]
    facing = normal_dot(solid.shape, solid.half, p, part, (solid.rotation.T @ scene.light).tolist())
    light = scene.ambient + (1.12 - scene.ambient) * np.maximum(facing, 0.0)
    w = weight(solid.texture, p, part, solid.half, solid.count, solid.phase, blur)
    return _mix(solid.first, solid.second, w, light)


def _shade_backdrop(scene: Scene, frame: int, d: np.ndarray, side: int):
    """Colour [3, n], depth [n] and part [n] of the ground and the wall along world directions d [3, n]."""
    back = scene.backdrop
    camera = scene.cameras[frame]
    ox, oy, oz = camera.position.tolist()
    depth = (back.wall_z - oz) / d[2]
    below = oy + depth * d[1] > 0
    on_ground = np.flatnonzero(below)
    on_wall = np.flatnonzero(~below)
    rgb = np.empty(d.shape, np.float32)
    part = below.astype(np.int8)
    if on_ground.size:
        dx, dy, dz = d[:, on_ground]
        t = -oy / dy
        depth[on_ground] = t
        x, z = ox + t * dx, oz + t * dz
        length = t * t * (1.0 / (-oy * camera.focal * side))  # of a pixel along the view, in metres
        rgb[:, on_ground] = _ground(back, x, z, length) * _shadow(scene, frame, x, z)
    if on_wall.size:
        dx, dy, _ = d[:, on_wall]
        t = depth[on_wall]
        rgb[:, on_wall] = _wall(back, ox + t * dx, oy + t * dy)
    return rgb, depth, part


def _ground(back: Backdrop, x: np.ndarray, z: np.ndarray, length: np.ndarray) -> np.ndarray:
    pattern, first, second = back.ground
    c, s = math.cos(back.turn) / back.cell, math.sin(back.turn) / back.cell
    u, v = c * x + s * z + back.phases[0], c * z - s * x + back.phases[1]
    if pattern == "tiles":
        blur = np.maximum(length * (0.6 / back.cell), 0.03)
        a, b = wave(u * 0.5, blur), wave(v * 0.5, blur)
        w = (a + b - 2.0 * a * b) * back.contrast
    elif pattern == "planks":
        w = wave(u * 0.5, np.maximum(length * (0.6 / back.cell), 0.03)) * back.contrast
    elif pattern == "patches":
        w = 0.5 + 0.25 * np.sin(3.0 * u + np.sin(2.3 * v)) + 0.25 * np.sin(2.6 * v - 1.3 * u)
        w *= back.contrast
    else:
        w = np.clip(z * 0.12 + 0.4, 0.0, 1.0)
    return _mix(first, second, w)


def _shadow(scene: Scene, frame: int, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Share of light on the ground: a soft ellipse below each object, drawn out away from the sun."""
    lx, ly, lz = scene.light.tolist()
    flat = math.hypot(lx, lz)
    ux, uz = lx / flat, lz / flat
    light = None
    for solid in scene.solids:
        cx, cz = (solid.centre + solid.motion * frame)[[0, 2]].tolist()
        width = 1.25 * max(solid.half[0], solid.half[2])
        length = min(1.4 * solid.half[1] * flat / -ly, 1.5)
        long = width + 0.5 * length
        a = (x - (cx - 0.5 * length * ux)) * (ux / long) + (z - (cz - 0.5 * length * uz)) * (uz / long)
        b = ((x - cx) * uz - (z - cz) * ux) * (1 / width)
        share = 1.0 - 0.62 * np.clip(1.35 - 1.35 * (a * a + b * b), 0.0, 1.0)
        light = share if light is None else np.minimum(light, share)
    return light


def _wall(back: Backdrop, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    pattern, first, second = back.wall
    w = np.clip(y * -0.28, 0.0, 1.0)
    if pattern == "clouds":
        p, q = back.phases
        puff = np.sin(1.1 * x + 6 * p + np.sin(1.7 * y + 6 * q)) * np.sin(2.2 * y + 9 * p)
        w = np.clip(w + 0.28 * back.contrast * puff, 0.0, 1.0)
    elif pattern == "panels":
        w = 0.7 * w + 0.3 * ramp(np.abs(np.sin((1.2 / back.cell) * x + 6 * back.phases[0])) - 0.6, 0.25)
    return _mix(first, second, w)
