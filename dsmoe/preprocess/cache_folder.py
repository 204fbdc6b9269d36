"""The folder of a latent cache that is being built: what is there already, one shard more, the manifest at the end.

Beside the shards it has DIR/building/ meanwhile, with header.json (what is built), lease.json (by which job) and, for
each finished shard, NNNNN.json (its size, SHA-256 and damaged items). The manifest takes their place.
Functions here are of one process; who does what when there are many is the caller's matter (cache_build).
"""

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from dsmoe.base.errors import ConfigError, DataError
from dsmoe.base.files import sync_folder, whole_file, write_whole
from dsmoe.base.run_folder import Lease, RunFolder
from dsmoe.base.sealed import difference, digest, seal, size_difference, unseal
from dsmoe.data.dataset import Fault
from dsmoe.data.latent_cache import BUILDING, FORMAT, MANIFEST, CacheHeader, mismatches, read_manifest

_HEADER = "header.json"
_SPARE_BYTES = 64 << 20


class CacheFolder:
    """One cache under construction at `path`. Creating the object touches nothing."""

    def __init__(self, path: Path, header: CacheHeader) -> None:
        self.path, self.header = path, header
        self._building = path / BUILDING
        self._former: list[dict] = []  # shards of a manifest that lost some

    @property
    def lease_folder(self) -> RunFolder:
        """Where the lease lies."""
        return RunFolder(self._building)

    def check(self) -> bool:
        """Whether the cache is complete already; ConfigError when the folder holds something else or cannot be used.

        One that lost shards is not. Writes nothing.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out {self.path} is a file; give a folder.")
        complete = False
        if (self.path / MANIFEST).exists():
            tree = read_manifest(self.path)
            self._compare(tree)
            complete = not any(size_difference(self.path / shard["name"], shard) for shard in tree["shards"])
            self._former = [] if complete else tree["shards"]
        elif (self._building / _HEADER).exists():
            self._compare(self._started())
        elif self.path.exists() and any(p.name != BUILDING for p in self.path.iterdir()):
            raise ConfigError(f"--out {self.path} is not empty and holds no latent cache; give a new or empty folder.")
        self._try_to_write()
        return complete

    def _started(self) -> dict:
        path = self._building / _HEADER
        try:
            return unseal(path.read_text(encoding="utf-8"), FORMAT)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); delete {self.path} and build anew.") from error

    def _compare(self, tree: dict) -> None:
        found = CacheHeader.from_dict(tree).facts()
        if wrong := mismatches(found, self.header.facts(), ("the folder", "this command")):
            raise ConfigError(f"--out {self.path} holds another latent cache: {'; '.join(wrong)}. Give another --out.")

    def _try_to_write(self) -> None:
        nearest = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if p.exists())
        try:
            with tempfile.TemporaryFile(dir=nearest, prefix="."):
                pass
        except OSError as error:
            raise ConfigError(f"--out {self.path} cannot be written ({error.strerror}); give another.") from error

    def needed(self) -> tuple[int, int]:
        """(bytes still to write, bytes free there)."""
        items = sum(len(self.header.shard_range(s)) for s in range(self.header.shards) if not self.stated(s))
        nearest = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if p.exists())
        return items * self.header.item_bytes, shutil.disk_usage(nearest).free

    def require_space(self) -> None:
        """ConfigError when what is missing does not fit on the disk."""
        needed, free = self.needed()
        if needed + _SPARE_BYTES > free:
            raise ConfigError(
                f"the latent cache needs {needed / 2**30:.3g} GiB more in {self.path} and {free / 2**30:.3g} GiB are "
                "free; free some, give another --out, or --dtype bfloat16."
            )

    def start(self) -> Lease:
        """Take over the folder, made if need be; what a killed job had not finished goes."""
        self._building.mkdir(parents=True, exist_ok=True)
        lease = Lease.take(self.lease_folder)
        write_whole(self._building / _HEADER, seal(self.header.to_dict()))
        if self._former:
            for shard, stated in enumerate(self._former):
                write_whole(self._record(shard), json.dumps(stated) + "\n")
            self._former = []
            (self.path / MANIFEST).unlink()
        for folder in (self.path, self._building):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        return lease

    def stated(self, shard: int) -> dict | None:
        """What is recorded of a finished shard, once its file has that size; None when it has to be made."""
        try:
            former = self._former[shard] if self._former else None
            stated = former or json.loads(self._record(shard).read_text(encoding="utf-8"))
            return None if size_difference(self.path / self.header.shard_name(shard), stated) else stated
        except (OSError, ValueError, KeyError):
            return None

    def is_whole(self, shard: int) -> bool:
        """Whether a finished shard's every byte is as recorded."""
        stated = self.stated(shard)
        return stated is not None and not difference(self.path / self.header.shard_name(shard), stated)

    def write(self, shard: int, tensors: dict[str, Tensor], faults: Iterable[Fault], lease: Lease) -> None:
        """Add a shard, whole or not at all; TrainingFailure when another job has taken over, OSError of the disk."""
        path = self.path / self.header.shard_name(shard)
        with whole_file(path) as temporary:
            # One metadata entry: the library writes several in an order that changes from process to process.
            about = json.dumps(self.header.to_dict() | {"shard": shard}, sort_keys=True)
            save_file(tensors, temporary, metadata={"dsmoe": about})
            stated = digest(temporary)
            lease.verify()
        named = [[fault.item, fault.name, fault.reason] for fault in faults]
        write_whole(self._record(shard), json.dumps({"name": path.name, **stated, "damaged": named}) + "\n")

    def faults(self) -> list[Fault]:
        """Damaged items of all shards, in item order."""
        found = [Fault(*entry) for shard in range(self.header.shards) for entry in self._finished(shard)["damaged"]]
        return sorted(found, key=lambda fault: fault.item)

    def complete(self, lease: Lease) -> None:
        """Seal the manifest over all shards: the cache exists from then on."""
        shards = []
        for shard in range(self.header.shards):
            items, stated = self.header.shard_range(shard), self._finished(shard)
            place = {"first": items.start, "count": len(items)}
            shards.append({name: stated[name] for name in ("name", "bytes", "sha256", "damaged")} | place)
        content = self.header.to_dict() | {"shards": shards}
        lease.verify()
        sync_folder(self.path)
        write_whole(self.path / MANIFEST, seal(content))
        sync_folder(self.path)
        self.clear()

    def clear(self) -> None:
        """Remove what only the building needed."""
        shutil.rmtree(self._building, ignore_errors=True)

    def _finished(self, shard: int) -> dict:
        stated = self.stated(shard)
        if stated is None:
            name = self.header.shard_name(shard)
            raise DataError(f"{self.path / name} vanished or changed its size while the cache was built; start again.")
        return stated

    def _record(self, shard: int) -> Path:
        return self._building / f"{shard:05d}.json"
