"""What every image data set offers, and the choice of one by name.

Not here: decoding (encoded_images), generated images (scenes), random choices (order) and batching (loader).
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.base.recipe import SOURCES


class ImageDataset(Protocol):
    """Labelled images by item number, without randomness: read(i) gives the same on every rank and worker.

    Instances are sent to loader processes, so they must pickle; keep open files out of them.
    """

    num_classes: int
    class_names: tuple[str, ...]
    fingerprint: str  # see `fingerprint_of`

    def __len__(self) -> int: ...

    def read(self, i: int) -> tuple[np.ndarray, int]:
        """(image uint8 [H, W, 3] at the run's resolution, label in 0..num_classes-1) of item 0 <= i < len."""
        ...


def fingerprint_of(*parts: bytes | str | np.ndarray) -> str:
    """Sixteen hex digits that name a data set's content: its kind, item names, sizes in bytes and labels.

    The same on every machine: no absolute path, no time of change and no byte order goes in (arrays are hashed as
    little-endian int64). A file whose bytes change at the same size is not noticed.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part, dtype="<i8").tobytes()
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Fault:
    """An item that was asked for and could not be decoded: number, name within the data set, reason."""

    item: int
    name: str
    reason: str


@runtime_checkable
class FaultReporter(Protocol):
    """A data set that stands in for damaged items. Faults are met in any process and judged in one place.

    The loader drains the copy of the data set that read the images and hands the faults, in batch order, to
    `account` of the copy in the training process.
    """

    faults: tuple[Fault, ...]  # distinct ones accounted so far

    def name(self, i: int) -> str:
        """Item i as people know it, such as "class/file"."""
        ...

    def drain_faults(self) -> tuple[Fault, ...]:
        """Faults met by `read` since the last call, in order; forgets them."""
        ...

    def account(self, reads: int, faults: Iterable[Fault]) -> None:
        """Add `reads` items asked for, of which `faults` were damaged; DataError once there are too many."""
        ...


def build_dataset(
    source: str,
    *,
    path: str | Path | None = None,
    resolution: int,
    size: int | None = None,
    split: str = "train",
    max_bad_fraction: float = 0.01,
    label_map: str | None = None,
    index_folder: str | None = None,
) -> ImageDataset:
    """The data set of a recipe's `data` section.

    source: "scenes" (generated; takes size and split), or files of one split at path: "image_folder" (a folder of class
    folders), "webdataset" (tars), "parquet". resolution: side of the square images in pixels. size: distinct images of
    `scenes`, None for its default. max_bad_fraction: share of undecodable items above which a set is refused while it
    is read. label_map: file that numbers and names the classes (label_map.py). index_folder: where an index of the
    items is kept (index_file.py). ConfigError on an unknown source or a contradiction, DataError on data that cannot
    be used.
    """
    if source == "scenes":
        from dsmoe.data.scenes import Scenes

        return Scenes(split=split, resolution=resolution, size=size)
    if source not in SOURCES:
        raise ConfigError(choose_from("data.source", source, SOURCES))
    if path is None:
        raise ConfigError(f"data.source is {source} and data.path is missing; give data.path=PATH.")
    if size is not None:
        raise ConfigError(f"data.size is {size}; only data.source scenes takes a size. Drop it.")
    if split != "train":
        raise ConfigError(
            f"split {split!r} asked of data.source {source}, whose data.path is one split; "
            "give the folder or files of that split as data.path."
        )
    return _of_files(source)(path, resolution, max_bad_fraction, label_map, index_folder)


def _of_files(source: str) -> Callable[..., ImageDataset]:
    """The class of a source, imported only when it is used."""
    if source == "webdataset":
        from dsmoe.data.webdataset import WebDataset

        return WebDataset
    if source == "parquet":
        from dsmoe.data.parquet import ParquetImages

        return ParquetImages
    from dsmoe.data.image_folder import ImageFolder

    return ImageFolder
