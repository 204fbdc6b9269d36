"""The kept index of a data set: made once by whichever processes come, shared out by shard, then read by all.

Processes meet at byte-range locks of one file, which the system takes back from a process that dies; no process group
is needed, so `--plan` and every rank of every host go the same way. Not here: what an index holds (item_index).
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from dsmoe.base.errors import DataError
from dsmoe.data.item_index import ItemIndex, concatenate
from dsmoe.runtime.logging import Progress, get_logger

BESIDE = ".dsmoe-index"  # folder in the data's own, where it can be written
PARTS = 64  # pieces of work that processes share out; each stays on disk until all are done


@dataclass(frozen=True)
class Shard:
    """A file or folder that holds items: name for people, path, and what tells that it has changed."""

    name: str
    path: Path
    size: int
    changed_ns: int

    @staticmethod
    def of(path: Path, name: str) -> "Shard":
        """The shard as it is now; DataError when it cannot be looked at. A folder has size 0."""
        try:
            found = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {str(path)!r}: {error.strerror}; check the path and the mount.") from error
        return Shard(name, path, 0 if path.is_dir() else found.st_size, found.st_mtime_ns)


Scan = Callable[[Shard], ItemIndex]


def kept_index(kind: str, root: Path, shards: Sequence[Shard], scan: Scan, folder: str | None = None) -> ItemIndex:
    """The index of these shards, read from where it is kept or made and kept there.

    root: the folder of the data. folder: where to keep the index; by default beside the data or, where that cannot be
    written, in the user's cache. A kept index is taken only when names, sizes and times of change of all shards agree.
    DataError as `scan` raises it, and when there is no place to keep the index.
    """
    stamp = _stamp(shards)
    places = _places(kind, root, shards, folder)
    for place in places:
        if (index := ItemIndex.load(place, stamp=stamp)) is not None:
            return index
    place = _writable(places, folder)
    try:
        return _make(place, stamp, kind, shards, scan)
    except (OSError, SafetensorError) as error:
        if (index := ItemIndex.load(place, stamp=stamp)) is not None:  # without locks, another may have been faster
            return index
        raise DataError(
            f"cannot write the index {str(place)!r}: {error}; make room or give data.index_folder."
        ) from error


def _places(kind: str, root: Path, shards: Sequence[Shard], folder: str | None) -> list[Path]:
    """Files where the index may lie. Outside the data's folder the name also tells which folder is meant."""
    names = json.dumps([shard.name for shard in shards])
    here = f"{kind}-{hashlib.sha256(names.encode()).hexdigest()[:12]}.safetensors"
    named = hashlib.sha256((str(root.resolve()) + names).encode()).hexdigest()[:12]
    elsewhere = f"{kind}-{root.resolve().name}-{named}.safetensors"
    if folder is not None:
        return [Path(folder).expanduser() / elsewhere]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [root / BESIDE / here, cache / "dsmoe" / "index" / elsewhere]


def _writable(places: Sequence[Path], folder: str | None) -> Path:
    for place in places:
        try:
            _respect_mode(place.parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            with _locks(place):
                return place
        except OSError as error:
            reason = f"{place.parent}: {error.strerror}"
    given = "another data.index_folder" if folder else "data.index_folder=FOLDER"
    raise DataError(f"the index of the data cannot be kept in {reason}; give {given}, one that can be written.")


def _respect_mode(folder: Path) -> None:
    """PermissionError where nobody may write; root could, and would change data that was locked on purpose."""
    known = next(place for place in (folder, *folder.parents) if place.exists())
    if not known.stat().st_mode & 0o222:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(known))


class _Locks:
    """Byte i of a file is lock i, this process's own or another's. Where a file system has no locks, all are ours."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def take(self, i: int, wait: bool) -> bool:
        """Whether lock i is ours now; with wait it is, sooner or later."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, i)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            get_logger("data").debug("no file locks here (%s): every process makes the index by itself", error)
        return True

    def release(self, i: int) -> None:
        """Let others have lock i."""
        with suppress(OSError):  # as in `take`
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, i)


@contextmanager
def _locks(place: Path) -> Iterator[_Locks]:
    descriptor = os.open(place.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _Locks(descriptor)
    finally:
        os.close(descriptor)  # gives every lock back


def _stamp(shards: Sequence[Shard]) -> str:
    return json.dumps([[shard.name, shard.size, shard.changed_ns] for shard in shards])


def _make(place: Path, stamp: str, kind: str, shards: Sequence[Shard], scan: Scan) -> ItemIndex:
    """Scan what nobody else is scanning, wait for the rest, join the parts."""
    size = -(-len(shards) // PARTS)
    pieces = [shards[first : first + size] for first in range(0, len(shards), size)]
    progress = Progress(f"indexing {kind}", len(shards), "shards")
    with _locks(place) as locks:
        for wait in (False, True):  # first what is free, then what others have begun, in case they died
            if wait and progress.done < len(shards):
                get_logger("data").info("other processes index the other shards of %s; waiting for them", place)
            for number, piece in enumerate(pieces):
                if not locks.take(number, wait):
                    continue
                if ItemIndex.load(place, stamp=stamp) is None:
                    _scan_piece(_part(place, number), piece, scan, progress)
                locks.release(number)
        locks.take(len(pieces), wait=True)
        if (index := ItemIndex.load(place, stamp=stamp)) is None:
            index = _join(place, stamp, pieces)
    if progress.done:
        progress.finish()
        get_logger("data").info("index of %d items kept in %s", len(index), place)
    return index


def _part(place: Path, number: int) -> Path:
    return place.with_suffix(".parts") / f"{number:05d}.safetensors"


def _scan_piece(part: Path, piece: Sequence[Shard], scan: Scan, progress: Progress) -> None:
    if ItemIndex.load(part, stamp=_stamp(piece)) is not None:
        return
    found = []
    for shard in piece:
        found.append(scan(shard))
        progress.update()
    part.parent.mkdir(exist_ok=True)
    concatenate(found).save(part, stamp=_stamp(piece))


def _join(place: Path, stamp: str, pieces: list[Sequence[Shard]]) -> ItemIndex:
    parts = [ItemIndex.load(_part(place, n), stamp=_stamp(piece)) for n, piece in enumerate(pieces)]
    if missing := [n for n, part in enumerate(parts) if part is None]:
        raise DataError(f"part {missing[0]} of the index {str(place)!r} was taken away while it was made; start again.")
    concatenate(parts).save(place, stamp=stamp)
    del parts  # unmapped before they are removed, which network file systems care about
    shutil.rmtree(place.with_suffix(".parts"), ignore_errors=True)
    index = ItemIndex.load(place, stamp=stamp)
    if index is None:
        raise DataError(f"the index {str(place)!r} does not read back as it was written; check the disk.")
    return index
