"""The checkpoints in a folder: which are committed, which are whole, how one is added, how old ones go.

A checkpoint exists from the moment its folder is renamed to `images-<n>`; whatever begins with `.tmp-` never
happened. `latest` is for people and other tools: dsmoe looks at the folders themselves.
Functions here are of one process; who does what when there are many is the caller's matter (saver).
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

from dsmoe.base.errors import CheckpointError
from dsmoe.base.files import sync_folder, write_durably, write_whole
from dsmoe.base.sealed import difference, digest, seal
from dsmoe.checkpoint.manifest import FORMAT, STATE_FILE, manifest_name, shard_name
from dsmoe.checkpoint.reader import read_state

LATEST = "latest"
_PREFIX, _TEMPORARY, _ASIDE = "images-", ".tmp-", "damaged-"


class Store:
    """The checkpoints under `root` (a run folder's ckpt/), each named by the images seen when it was made."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def committed(self) -> list[int]:
        """Images seen of every committed checkpoint, whole or damaged, newest first."""
        if not self.root.is_dir():
            return []
        names = [p.name.removeprefix(_PREFIX) for p in self.root.iterdir() if p.name.startswith(_PREFIX)]
        return sorted((int(n) for n in names if n.isdecimal()), reverse=True)

    def path(self, images_seen: int) -> Path:
        """Folder of a committed checkpoint."""
        return self.root / f"{_PREFIX}{images_seen:09d}"

    def temporary(self, images_seen: int, word: str) -> Path:
        """Folder in which one is written; `word` is the job's own."""
        return self.root / f"{_TEMPORARY}{images_seen:09d}-{word}"

    def remove_stale(self) -> list[str]:
        """Remove what earlier jobs left unfinished; the names removed. Call with the lease in hand."""
        stale = sorted(p for p in self.root.glob(f"{_TEMPORARY}*") if p.is_dir())
        for path in stale:
            shutil.rmtree(path, ignore_errors=True)
        return [p.name for p in stale]

    def damage(self, images_seen: int, part: int = 0, parts: int = 1) -> str:
        """What is wrong with a checkpoint, file first; "" when nothing is.

        parts: processes that share the reading; this one hashes every parts-th file beginning at `part`.
        """
        folder = self.path(images_seen)
        try:
            files = read_state(folder)["files"]
        except CheckpointError as error:
            return str(error).removeprefix(f"checkpoint {folder} is damaged: ").removesuffix(".")
        found = (difference(folder / name, files[name]) for name in sorted(files)[part::parts])
        return next(filter(None, found), "")

    def set_aside(self, images_seen: int) -> Path:
        """Take a damaged checkpoint out of the count; its files stay, under the returned name."""
        source = self.path(images_seen)
        for attempt in range(1000):
            target = self.root / f"{_ASIDE}{source.name}{f'.{attempt}' if attempt else ''}"
            if not target.exists():
                break
        os.rename(source, target)
        return target

    def commit(self, temporary: Path, images_seen: int, ranks: int, state: dict) -> Path:
        """Check every rank's files, seal the state over them, and rename: the checkpoint exists from then on.

        CheckpointError when a rank's file is not what its manifest says; OSError of the disk.
        """
        files = {}
        for rank in range(ranks):
            stated = _stated_shard(temporary, rank)
            files[shard_name(rank)] = stated
            files[manifest_name(rank)] = digest(temporary / manifest_name(rank))
        content = {**state, "format": FORMAT, "images_seen": images_seen, "ranks": ranks, "files": files}
        write_durably(temporary / STATE_FILE, seal(content))
        sync_folder(temporary)
        target = self.path(images_seen)
        os.rename(temporary, target)
        sync_folder(self.root)
        with contextlib.suppress(OSError):  # a disk filled up this very moment; the checkpoint stands without it
            write_whole(self.root / LATEST, target.name + "\n")
        return target

    def prune(self, keep: int, keep_every: int = 0) -> list[int]:
        """Delete all but the newest `keep`, and the first at or after every multiple of keep_every; the deleted.

        The newest is never deleted. keep_every in images, 0 for none.
        """
        oldest_first = self.committed()[::-1]
        stay = set(oldest_first[-max(keep, 1) :])
        if keep_every:
            window = {}
            for images_seen in oldest_first:
                window.setdefault(images_seen // keep_every, images_seen)
            stay |= {n for number, n in window.items() if number}
        gone = [n for n in oldest_first if n not in stay]
        for images_seen in gone:
            self.remove(images_seen)
        return gone

    def remove(self, images_seen: int) -> None:
        """Delete a committed checkpoint."""
        # Renamed first: a half-deleted folder must not look like a damaged checkpoint.
        doomed = self.temporary(images_seen, "deleted")
        os.rename(self.path(images_seen), doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def size(self, images_seen: int) -> int:
        """Bytes of a checkpoint's files."""
        return sum(p.stat().st_size for p in self.path(images_seen).iterdir())

    def free(self) -> int:
        """Bytes that can still be written here, or in the nearest folder above that exists."""
        path = self.root.absolute()
        return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _stated_shard(temporary: Path, rank: int) -> dict:
    """Size and hash that a rank's manifest states of its shard, once the shard has that size."""
    try:
        stated = json.loads((temporary / manifest_name(rank)).read_text(encoding="utf-8"))["file"]
        size = (temporary / shard_name(rank)).stat().st_size
    except (OSError, ValueError) as error:
        raise CheckpointError(f"rank {rank} left no whole shard in {temporary} ({error}).") from error
    if size != stated["bytes"]:
        raise CheckpointError(f"{temporary / shard_name(rank)} has {size} bytes instead of {stated['bytes']}.")
    return {"bytes": stated["bytes"], "sha256": stated["sha256"]}
