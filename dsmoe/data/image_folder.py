"""Images in one folder a class, as ImageNet lies on disk, or flat with a label map. Not here: decoding, order."""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from dsmoe.base.errors import DataError
from dsmoe.data.encoded_images import NAMES_SHOWN, EncodedImages
from dsmoe.data.index_file import Shard, kept_index
from dsmoe.data.item_index import ItemIndex, concatenate, one_shard
from dsmoe.data.label_map import Classes, classes_of, read_file_map

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SPLIT_NAMES = frozenset({"train", "val", "valid", "validation", "test"})
KIND = "image_folder"
# Fewer items are listed about as fast as an index of them is checked, so none is kept.
KEPT_FROM = 20_000
_FLAT = ""  # name of the shard of a flat folder
_WANT = "give a folder that holds one sub-folder of images for each class"


class ImageFolder(EncodedImages):
    """PATH/<class>/<image>: classes by sorted folder name (or label_map), items by class, then sorted file name.

    Only files directly in a class folder count, by extension in any case (EXTENSIONS); hidden files and folders are
    skipped. With a label_map that lists files, PATH/<image> is read: ImageNet's flat validation folder. Folders of
    KEPT_FROM images or more keep an index (index_file; index_folder is its place).
    """

    def __init__(
        self,
        path: str | Path,
        resolution: int,
        max_bad_fraction: float = 0.01,
        label_map: str | None = None,
        index_folder: str | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        shards = _shards(self.path, label_map)
        index = _list_all(shards, KEPT_FROM)
        if index is None:
            index = kept_index(KIND, self.path, shards, _scan, index_folder)
        _refuse_empty(index, self.path)
        where = str(self.path)
        if shards[0].name == _FLAT:
            index, classes = _label_by_file(index, where, str(label_map))
        else:
            classes = classes_of(index.classes, where, label_map) if label_map else _sorted_folders(index)
        super().__init__(where, index, classes, resolution, max_bad_fraction)

    def name(self, i: int) -> str:
        """Item i as "class/file", or "file" of a flat folder."""
        return super().name(i).lstrip("/")

    def content(self, item: int) -> bytes:
        """See `EncodedImages`."""
        path = self.path / self.name(item)
        try:
            return path.read_bytes()
        except OSError as error:
            # Not damage: a lost mount must stop the run, not shift it to other images.
            raise DataError(
                f"cannot read {str(path)!r}: {error.strerror}; check the disk, the mount and the permissions."
            ) from error


def _sorted_folders(index: ItemIndex) -> Classes:
    """Folder names are class names also where they are numbers: torchvision's convention."""
    return Classes(index.classes, np.arange(len(index.classes), dtype=np.int32))


def _list_all(shards: Sequence[Shard], limit: int) -> ItemIndex | None:
    """The index of the folders, or None when they hold `limit` images or more."""
    found, total = [], 0
    for shard in shards:
        found.append(_scan(shard))
        total += len(found[-1])
        if total >= limit:
            return None
    return concatenate(found)


def _scan(shard: Shard) -> ItemIndex:
    """The images of one folder; none is judged later, when all empty folders can be named at once."""
    files = _list(shard.path)[1]
    label = None if shard.name == _FLAT else shard.name
    try:
        sizes = [file.stat().st_size for file in files]
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename!r}: {error.strerror}; check that nobody is moving files."
        ) from error
    return one_shard(KIND, shard.name, [label] * len(files), [file.name for file in files], sizes=sizes)


def _refuse_empty(index: ItemIndex, root: Path) -> None:
    empty = [index.shards[n] for n in np.flatnonzero(np.diff(index.arrays["shard_starts"].astype(np.int64)) == 0)]
    if empty:
        shown = ", ".join(repr(name) for name in empty[:NAMES_SHOWN])
        raise DataError(
            f"{len(empty)} of {len(index.shards)} class folders in {str(root)!r} hold no images "
            f"({', '.join(EXTENSIONS)}): {shown}; fill or remove them, or, if they hold folders, {_WANT}."
        )


def _label_by_file(index: ItemIndex, where: str, label_map: str) -> tuple[ItemIndex, Classes]:
    """A flat folder's index with the labels that the map gives its files."""
    given = read_file_map(label_map)
    blob, starts = index.arrays["names"].tobytes(), index.arrays["name_starts"].tolist()
    names = [os.fsdecode(blob[start:end]) for start, end in pairwise(starts)]
    labels = [given.get(name, given.get(os.path.splitext(name)[0])) for name in names]
    if missing := [name for name, label in zip(names, labels, strict=True) if label is None]:
        shown = ", ".join(repr(name) for name in missing[:NAMES_SHOWN])
        raise DataError(
            f"data.path {where!r} is flat and data.label_map {label_map!r} names no class for {len(missing)} of its "
            f"{len(names)} images: {shown}; it needs a line FILE CLASS for each."
        )
    labelled = one_shard(KIND, _FLAT, labels, names, sizes=index.arrays["sizes"])
    return concatenate([labelled]), classes_of(labelled.classes, where)


def _shards(root: Path, label_map: str | None) -> list[Shard]:
    """The class folders, sorted, or the folder itself where it is flat and has a label map; DataError otherwise."""
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"data.path {str(root)!r} {problem}; {_WANT}.")
    folders, stray = _list(root)
    splits = [name for name in folders if name.lower() in SPLIT_NAMES]
    if splits and (len(splits) == len(folders) or "train" in splits):
        raise DataError(
            f"data.path {str(root)!r} holds splits ({', '.join(splits)}), not classes; "
            f"give one of them: data.path={root / splits[0]}."
        )
    if folders:
        return [Shard.of(root / name, name) for name in folders]
    if not stray:
        raise DataError(f"data.path {str(root)!r} holds no class folders and no images; {_WANT}.")
    if label_map is None:
        raise DataError(
            f"data.path {str(root)!r} is flat: {len(stray)} images and no class folders; sort the images "
            "into one sub-folder for each class, or give data.label_map a file that names the class of each image "
            "(a line FILE CLASS)."
        )
    return [Shard.of(root, _FLAT)]


def _list(folder: Path) -> tuple[list[str], list[os.DirEntry]]:
    """The visible sub-folders' names and the visible image files, sorted by name; links are followed."""
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                    images.append(entry)
                elif entry.is_dir():
                    folders.append(entry.name)
    except OSError as error:
        raise DataError(f"cannot list {str(folder)!r}: {error.strerror}; check the permissions.") from error
    return sorted(folders), sorted(images, key=lambda entry: entry.name)
