"""The data set face of the scenes: splits, sizes, `read` and `read_full`. Drawing and rendering lie below."""

from dataclasses import dataclass

import numpy as np

from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.data.dataset import fingerprint_of
from dsmoe.data.scenes import scene as _scene
from dsmoe.data.scenes.catalogue import KINDS
from dsmoe.data.scenes.render import Renderer

MIN_SIDE, MAX_SIDE = 32, 512
# Split -> (first scene index, one past the last, default size). The ranges are disjoint.
SPLITS: dict[str, tuple[int, int, int]] = {
    "train": (0, 2**31, 16384),
    "validation": (2**31, 2**31 + 2**24, 2048),
    "test": (2**31 + 2**24, 2**31 + 2**25, 2048),
}


@dataclass(frozen=True)
class SceneFrames:
    """A scene with its exact labels, H = W = resolution.

    image, image2: uint8 [H, W, 3], frames 1 and 2. label: int.
    depth: float32 [H, W], metres along the optical axis of frame 1, finite everywhere.
    flow: float32 [H, W, 2], pixels (u right, v down) from frame 1 to frame 2 of the surface point seen in
    frame 1, hidden in frame 2 or not.
    amodal: bool [H, W], whole silhouette of the main object inside the image. visible: its unhidden part.
    intrinsics: (focal, cx, cy) in pixels, pixel centres at integers.
    poses: per frame (rotation [3, 3], position [3]) in float64, world = rotation @ camera + position.
    motions: float64 [objects, 3], world translation of each object between the frames.
    owner: int8 [H, W], 0 backdrop, 1 the main object, 2 the occluder.
    """

    image: np.ndarray
    image2: np.ndarray
    label: int
    depth: np.ndarray
    flow: np.ndarray
    amodal: np.ndarray
    visible: np.ndarray
    intrinsics: tuple[float, float, float]
    poses: tuple[tuple[np.ndarray, np.ndarray], ...]
    motions: np.ndarray
    owner: np.ndarray


class Scenes:
    """Procedural scenes of sixteen classes.

    split: train, validation or test. resolution: side in pixels, 32 to 512. size: number of scenes, default
    16384 for train and 2048 for the others. Raises ConfigError on anything else.
    """

    def __init__(self, split: str, resolution: int, size: int | None = None) -> None:
        if not isinstance(split, str) or split not in SPLITS:
            raise ConfigError(choose_from("split of the scenes", split, SPLITS))
        if not _is_integer(resolution) or not MIN_SIDE <= resolution <= MAX_SIDE:
            raise ConfigError(
                f"scenes: resolution {resolution!r} is not an integer from {MIN_SIDE} to {MAX_SIDE}; "
                f"choose one in that range, such as 64."
            )
        first, end, default = SPLITS[split]
        if size is None:
            size = default
        if not _is_integer(size) or not 1 <= size <= end - first:
            raise ConfigError(
                f"scenes: size {size!r} of split {split!r} is not an integer from 1 to {end - first}; "
                f"leave it out for the default {default}."
            )
        self.split, self.resolution, self.size = split, int(resolution), int(size)
        self._first = first
        self._renderer = Renderer(self.resolution)

    @property
    def num_classes(self) -> int:
        return len(KINDS)

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(kind.name for kind in KINDS)

    @property
    def fingerprint(self) -> str:
        """Names split, size and classes (`fingerprint_of`); resolution is not part of it."""
        return fingerprint_of("scenes", self.split, str(self.size), *self.class_names)

    def __len__(self) -> int:
        return self.size

    def label(self, i: int) -> int:
        """Class of item i without rendering it."""
        return _scene.label_of(self._index(i))

    def read(self, i: int) -> tuple[np.ndarray, int]:
        """(image uint8 [H, W, 3], label) of item i; IndexError outside 0 .. len - 1."""
        scene = _scene.draw(self._index(i))
        return self._renderer.image(scene), scene.label

    def read_full(self, i: int) -> SceneFrames:
        """Item i with the second frame and every exact label."""
        scene = _scene.draw(self._index(i))
        image, depth, part, amodal = self._renderer.layers(scene, 0)
        image2 = self._renderer.layers(scene, 1)[0]
        owner = (part >> 4).astype(np.int8)
        middle = (self.resolution - 1) / 2
        return SceneFrames(
            image=image,
            image2=image2,
            label=scene.label,
            depth=depth,
            flow=self._renderer.flow(scene, depth, part),
            amodal=amodal,
            visible=owner == 1,
            intrinsics=(scene.cameras[0].focal * self.resolution, middle, middle),
            poses=tuple((c.rotation, c.position) for c in scene.cameras),
            motions=np.stack([s.motion for s in scene.solids]),
            owner=owner,
        )

    def _index(self, i: int) -> int:
        if not 0 <= i < self.size:
            raise IndexError(f"item {i} of a data set of {self.size}")
        return self._first + int(i)


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
