"""Where each item of a sharded data set lies and what its label is called, as compact arrays; in memory or mapped.

A shard is a tar, a parquet file or a class folder; items are numbered by shard, then by place in the shard. The file
form is safetensors: arrays and a metadata header, so nothing in it is ever executed. Not here: where that file is
kept and who makes it (index_file), reading the items (the data sets).
"""

import hashlib
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from dsmoe.base.errors import DataError
from dsmoe.base.files import whole_file
from dsmoe.data.dataset import fingerprint_of

FORMAT = "1"
NO_LABEL = -1
_CONTENT = ("names", "name_starts", "sizes", "shard_starts", "shard_sizes", "labels")
_HEADER_LIMIT = 64 << 20
_DTYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


class ItemIndex:
    """Names, labels and places of all items.

    kind: the source's name. shards: their names in order. classes: label texts as they stand in the data, sorted.
    arrays: `shard_starts` [S + 1], first item of each shard and the total; `labels` [N], place in classes or NO_LABEL;
    and what the source needs: `names` bytes of all names, `name_starts` [N + 1]; `sizes` [N] in bytes; `offsets` [N];
    others by shard. An ImageNet sample in a tar takes 29 bytes, 15 of them its name (tests/data/test_item_index.py).
    """

    def __init__(
        self,
        kind: str,
        shards: Sequence[str],
        classes: Sequence[str],
        arrays: Mapping[str, np.ndarray],
        file: tuple[Path, str] | None = None,
    ) -> None:
        self.kind, self.shards, self.classes = kind, tuple(shards), tuple(classes)
        self.arrays = dict(arrays)
        self._file = file  # where it is mapped from, and the checksum in its header

    def __len__(self) -> int:
        return len(self.arrays["labels"])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def fingerprint(self) -> str:
        """Of shard names, item names, sizes and labels (`fingerprint_of`); the same however the index was made."""
        content = [self.arrays[key] for key in _CONTENT if key in self.arrays]
        return fingerprint_of(self.kind, json.dumps(self.shards), json.dumps(self.classes), *content)

    def shard_of(self, item: int) -> int:
        """Number of the shard that holds the item."""
        return int(np.searchsorted(self.arrays["shard_starts"], item, side="right")) - 1

    def name_of(self, item: int) -> str:
        """The item's name within its shard."""
        start, end = self.arrays["name_starts"][item : item + 2].tolist()
        return os.fsdecode(self.arrays["names"][start:end].tobytes())

    def __getstate__(self) -> dict:
        """A mapped index travels to loader processes as its path: they map the same pages."""
        return self.__dict__ | ({"arrays": None} if self._file else {})

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self._file:
            path, checksum = self._file
            metadata, self.arrays = _map(path)
            if metadata.get("checksum") != checksum:
                raise DataError(f"the index {str(path)!r} was replaced while it was in use; start the run again.")

    def save(self, path: Path, **metadata: str) -> None:
        """Write the file form, whole or not at all; metadata rides along for `load`. OSError as open() raises."""
        arrays = {key: np.ascontiguousarray(array) for key, array in self.arrays.items()}
        own = {
            "format": FORMAT,
            "kind": self.kind,
            "shards": json.dumps(self.shards),
            "classes": json.dumps(self.classes),
            "checksum": _checksum(arrays),
        }
        with whole_file(path) as temporary:
            save_file(arrays, temporary, {**own, **metadata})

    @staticmethod
    def load(path: Path, **expected: str) -> "ItemIndex | None":
        """The mapped index, or None when there is none, or a damaged one, or one whose metadata is not as expected."""
        try:
            metadata, arrays = _map(path)
            wanted = {"format": FORMAT, "checksum": _checksum(arrays), **expected}
            if any(metadata.get(key) != value for key, value in wanted.items()):
                return None
            shards, classes = json.loads(metadata["shards"]), json.loads(metadata["classes"])
            return ItemIndex(metadata["kind"], shards, classes, arrays, (path, metadata["checksum"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def concatenate(parts: Sequence[ItemIndex]) -> ItemIndex:
    """One index of all shards of the parts, in order: labels are renumbered to the classes of all."""
    classes = sorted({name for part in parts for name in part.classes})
    code = {name: number for number, name in enumerate(classes)}
    joined: dict[str, list[np.ndarray]] = {key: [] for key in parts[0].arrays}
    for part in parts:
        table = np.array([code[name] for name in part.classes] + [NO_LABEL])  # the last is what NO_LABEL picks
        for key, array in part.arrays.items():
            joined[key].append(table[array] if key == "labels" else array)
    arrays = {
        key: _join_starts(pieces) if key.endswith("_starts") else np.concatenate(pieces)
        for key, pieces in joined.items()
    }
    shards = [name for part in parts for name in part.shards]
    return ItemIndex(parts[0].kind, shards, classes, {key: _compact(array) for key, array in arrays.items()})


def one_shard(
    kind: str, shard: str, labels: Sequence[str | None], names: Sequence[str] | None = None, **arrays: object
) -> ItemIndex:
    """The index of one shard from what its reader found: label text and name of each item, and any further arrays."""
    classes = sorted({label for label in labels if label is not None})
    code = {name: number for number, name in enumerate(classes)} | {None: NO_LABEL}
    own = {
        "labels": np.array([code[label] for label in labels], dtype=np.int64),
        "shard_starts": np.array([0, len(labels)]),
    }
    if names is not None:
        encoded = [os.fsencode(name) for name in names]
        own["names"] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        own["name_starts"] = np.cumsum([0] + [len(name) for name in encoded])
    own |= {key: np.asarray(array, dtype=np.int64) for key, array in arrays.items()}
    return ItemIndex(kind, [shard], classes, own)


def _join_starts(pieces: list[np.ndarray]) -> np.ndarray:
    """[0, 3, 5] and [0, 2] -> [0, 3, 5, 7]."""
    joined, total = [np.zeros(1, dtype=np.int64)], 0
    for piece in pieces:
        joined.append(piece[1:].astype(np.int64) + total)
        total += int(piece[-1])
    return np.concatenate(joined)


def _compact(array: np.ndarray) -> np.ndarray:
    """The same whole numbers in the narrowest type of `_DTYPES`."""
    if array.dtype == np.uint8:
        return array
    low, high = (int(array.min()), int(array.max())) if len(array) else (0, 0)
    for name in ("<u1", "<i2", "<u2", "<i4", "<u4"):
        if np.iinfo(name).min <= low and high <= np.iinfo(name).max:
            return array.astype(name)
    return array.astype("<i8")


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].dtype} {len(arrays[key])} ".encode())
        digest.update(arrays[key].data if len(arrays[key]) else b"")
    return digest.hexdigest()


def _map(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and arrays of a safetensors file, the arrays being views of its mapped pages; ValueError if damaged."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= _HEADER_LIMIT:
            raise ValueError("no safetensors header")
        header = json.loads(file.read(length))
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for key, entry in header.items():
        (count,), (start, _) = entry["shape"], entry["data_offsets"]
        arrays[key] = np.frombuffer(pages, dtype=_DTYPES[entry["dtype"]], count=count, offset=8 + length + start)
    return metadata, arrays
