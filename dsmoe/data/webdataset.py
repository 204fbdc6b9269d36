"""Images in WebDataset tars: `KEY.jpg` beside `KEY.cls` or `KEY.json`, read by position. Not here: decoding, order."""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from dsmoe.base.errors import DataError
from dsmoe.data.encoded_images import DamagedItem, EncodedImages
from dsmoe.data.index_file import Shard, kept_index
from dsmoe.data.item_index import NO_LABEL, ItemIndex, one_shard
from dsmoe.data.label_map import classes_of
from dsmoe.data.open_files import OpenFiles, unreadable
from dsmoe.data.shard_paths import shard_files
from dsmoe.runtime.logging import get_logger

KIND = "webdataset"
IMAGES = frozenset({"jpg", "jpeg", "png", "webp"})
MAX_OPEN = 256  # tars a process keeps open; a usual limit is 1024
_LABEL_LIMIT = 1 << 20  # bytes of a .cls or .json that are looked at
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_WANT = "an uncompressed tar of KEY.jpg (jpeg, png, webp) with KEY.cls, or KEY.json that has a label"


class WebDataset(EncodedImages):
    """Tars in the order of `shard_paths`; items by tar, then by first member of their sample.

    A sample is a run of members with one key, the name up to the first dot of its last part. It needs an image member
    (IMAGES) and a label: the text of `cls`, or "label" (else "cls") of `json`. A sample that lacks either is a damaged
    item, and so are the last sample of a tar that ends too early and what stands behind a damaged header. Members that
    belong to no such sample are ignored. Items are found by an index that is made once (index_file) and read by
    position, so any item costs one read.
    """

    def __init__(
        self,
        path: str | Path,
        resolution: int,
        max_bad_fraction: float = 0.01,
        label_map: str | None = None,
        index_folder: str | None = None,
    ) -> None:
        where = str(path)
        self.root, shards = shard_files(where, ".tar")
        self._paths = [shard.path for shard in shards]
        self._sizes = [shard.size for shard in shards]
        index = kept_index(KIND, self.root, shards, scan_tar, index_folder)
        _check(index, where)
        super().__init__(where, index, classes_of(index.classes, where, label_map), resolution, max_bad_fraction)
        self._tars = OpenFiles(MAX_OPEN, self._open, os.close)

    def content(self, item: int) -> bytes:
        """See `EncodedImages`."""
        shard, size = self.index.shard_of(item), int(self.index.arrays["sizes"][item])
        if not size:
            raise DamagedItem("no image in its sample")
        try:
            content = os.pread(self._tars[shard], size, int(self.index.arrays["offsets"][item]))
        except OSError as error:
            raise unreadable(self._paths[shard], error) from error
        if len(content) < size:
            raise DamagedItem("the tar ends within it")
        return content

    def _open(self, shard: int) -> int:
        descriptor = os.open(self._paths[shard], os.O_RDONLY)
        if os.fstat(descriptor).st_size != self._sizes[shard]:
            os.close(descriptor)
            raise DataError(f"{str(self._paths[shard])!r} has changed since the run began; start it again.")
        return descriptor


@dataclass
class _Sample:
    """What is known of one sample while its members pass by."""

    key: str
    offset: int = 0
    size: int = 0
    label: str | None = None
    described: bool = False  # has a label member, readable or not
    gap: bool = False  # stands for what a damaged header hides

    @property
    def complete(self) -> bool:
        return self.size > 0 and self.label is not None

    def take(self, member: tarfile.TarInfo, kind: str, descriptor: int) -> None:
        if kind in IMAGES and not self.size:
            self.offset, self.size = member.offset_data, member.size
        elif kind == "cls" or (kind == "json" and self.label is None):
            content = os.pread(descriptor, min(member.size, _LABEL_LIMIT), member.offset_data)
            found = _label(kind, content) if len(content) == member.size else None
            self.label = found or self.label
            self.described |= kind == "cls" or found is not None


def _label(kind: str, content: bytes) -> str | None:
    try:
        text = content.decode()
        if kind == "cls":
            return text.strip() or None
        found = json.loads(text)
        label = found.get("label", found.get("cls")) if isinstance(found, dict) else None
    except ValueError:
        return None
    return str(label) if isinstance(label, str | int) and not isinstance(label, bool) else None


def scan_tar(shard: Shard) -> ItemIndex:
    """The samples of one tar. DataError when it is compressed or no tar at all."""
    try:
        descriptor = os.open(shard.path, os.O_RDONLY)
        try:
            # A header every hundred kilobytes: reading ahead would read the whole tar.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            _refuse_compressed(shard.path, os.pread(descriptor, 2, 0))
            samples = _samples(shard, descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unreadable(shard.path, error) from error
    return one_shard(
        KIND,
        shard.name,
        [sample.label for sample in samples],
        [sample.key for sample in samples],
        offsets=[sample.offset for sample in samples],
        sizes=[sample.size for sample in samples],
    )


def _samples(shard: Shard, descriptor: int) -> list[_Sample]:
    found = [_Sample("")]  # a first one that is never an item spares a case
    for member in _members(shard, descriptor):
        if isinstance(member, _Damage):
            if found[-1].complete or not found[-1].key:
                found.append(_Sample(f"at byte {member.offset}", gap=True))
            continue
        key, kind = _split(member.name)
        if not key or key.endswith("/"):  # a hidden file, such as macOS puts beside each
            continue
        if key != found[-1].key:
            found.append(_Sample(key))
        found[-1].take(member, kind, descriptor)
    kept = [sample for sample in found if sample.size or sample.described or sample.gap]
    # A header that hid one member of the next sample is one damaged item, not two.
    end = _Sample("", size=1, label="")
    return [sample for sample, following in pairwise([*kept, end]) if not sample.gap or following.complete]


@dataclass(frozen=True)
class _Damage:
    """Bytes at this position that should be a member's header and are none."""

    offset: int


def _members(shard: Shard, descriptor: int) -> Iterator[tarfile.TarInfo | _Damage]:
    """The regular members in order; what lies behind a damaged header is found again by the next good one."""
    expected = 0  # where the next header should be
    with open(descriptor, "rb", closefd=False) as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)  # noqa: SIM115 - nothing of its own to close
        except tarfile.TarError as error:
            raise _no_tar(shard, str(error)) from error
        if not tar.members and any(os.pread(descriptor, tarfile.BLOCKSIZE, 0)):
            raise _no_tar(shard, "no header in it")
        while True:
            try:
                member = tar.next()
            except tarfile.TarError:  # the last member, or its long name, ends behind the end of the file
                member = None
            tar.members = tar.members[-1:]  # it keeps every member
            end = member.offset if member else shard.size
            if end > expected and any(os.pread(descriptor, tarfile.BLOCKSIZE, expected)):
                yield _Damage(expected)
            if member is None:
                return
            if tar.offset <= expected:  # a forged size would lead round in circles
                raise _no_tar(shard, f"a header at byte {member.offset} points backwards")
            expected = tar.offset
            if member.isreg():
                yield member


def _no_tar(shard: Shard, reason: str) -> DataError:
    return DataError(f"{str(shard.path)!r} is no tar ({reason}); give {_WANT}.")


def _split(name: str) -> tuple[str, str]:
    """ "a/b.c.jpg" -> ("a/b", "c.jpg")."""
    folder, _, file = name.rpartition("/")
    key, _, kind = file.partition(".")
    return (f"{folder}/{key}" if folder else key), kind.lower()


def _refuse_compressed(path: Path, magic: bytes) -> None:
    if how := _COMPRESSED.get(magic):
        raise DataError(
            f"{str(path)!r} is compressed ({how}), so its images cannot be read by position (and JPEGs do not shrink); "
            f"unpack it to a plain .tar, such as with `gunzip`."
        )


def _check(index: ItemIndex, where: str) -> None:
    """Warn of incomplete samples; DataError when they are the rule."""
    total = len(index)
    unlabelled = int((index.arrays["labels"] == NO_LABEL).sum())
    pictureless = int((index.arrays["sizes"] == 0).sum())
    if not total:
        raise DataError(f"the tars of data.path {where!r} hold no samples; give {_WANT}.")
    for count, lack in ((unlabelled, "label"), (pictureless, "image")):
        if 2 * count > total:
            raise DataError(f"{count} of the {total} samples of data.path {where!r} have no {lack}; give {_WANT}.")
    if unlabelled or pictureless:
        get_logger("data").warning(
            "%d samples of %r have no label and %d no image (damaged or cut tars): other images stand in",
            unlabelled, where, pictureless,
        )  # fmt: skip
