"""Saving while training goes on: a thread writes this rank's shard, the main thread commits when all have.

The step waits for the copy to host memory only. No collective runs in the thread: every rank reports a number
(`report`) with the figures that a step exchanges anyway, and gives everybody's numbers to `advance`, at the same
step on every rank. A disk that is full or gone costs that checkpoint, not the run.
Not here: when to save, and what the pieces are (training).
"""

import shutil
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dsmoe.base.errors import CheckpointError
from dsmoe.base.run_folder import Lease
from dsmoe.checkpoint.manifest import Piece
from dsmoe.checkpoint.store import Store
from dsmoe.checkpoint.writer import write_shard
from dsmoe.runtime import distributed
from dsmoe.runtime.logging import get_logger

# Room for manifests, state.json and what else is written meanwhile (metrics, samples).
_SPARE_BYTES = 16 << 20


@dataclass
class _Pending:
    """A checkpoint being written."""

    images_seen: int
    folder: Path
    state: dict
    thread: threading.Thread
    error: BaseException | None = None


class Saver:
    """Writes the checkpoints of one run; every rank has one and calls it in the same order.

    keep, keep_every: which stay, as in `Store.prune`.
    """

    def __init__(self, store: Store, lease: Lease, keep: int, keep_every: int = 0) -> None:
        self._store, self._lease, self._kept = store, lease, (keep, keep_every)
        self._pending: _Pending | None = None
        self._serial = 0
        self._log = get_logger("checkpoint")

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written or waits for its commit."""
        return self._pending is not None

    def begin(self, images_seen: int, pieces: Iterable[Piece], state: dict, total_bytes: int) -> None:
        """Copy the pieces to host memory and start writing them; one at a time.

        state: plain data, rank 0's counts; it is not to change afterwards. total_bytes: of all ranks' pieces together.
        """
        assert not self.busy, "a checkpoint is being written"
        host = [replace(piece, tensor=_host_copy(piece.tensor)) for piece in pieces]
        self._serial += 1
        folder = self._store.temporary(images_seen, f"{self._lease.generation}-{self._lease.holder[:8]}-{self._serial}")
        thread = threading.Thread(target=self._write, args=(host, total_bytes), name="checkpoint", daemon=True)
        self._pending = _Pending(images_seen, folder, state, thread)
        thread.start()

    def report(self) -> int:
        """This rank's number for the exchange: the serial of its last save, negative if failed, 0 while writing.

        Raises what went wrong in the thread when that was not the disk.
        """
        pending = self._pending
        if pending is None or pending.thread.is_alive():
            return 0
        if pending.error is not None and not isinstance(pending.error, OSError):
            raise pending.error
        return self._serial if pending.error is None else -self._serial

    def advance(self, reports: Sequence[int]) -> bool:
        """With every rank's report, the same list on all ranks: commit, or give up, once all have ended.

        Old reports are harmless: they carry an older serial. True when this call made a checkpoint.
        TrainingFailure when a later job has taken over the run folder.
        """
        if self._pending is None or any(abs(r) != self._serial for r in reports):
            return False
        pending, self._pending = self._pending, None
        failed = [rank for rank, r in enumerate(reports) if r < 0]
        if failed:
            self._give_up(pending, f"rank {', '.join(map(str, failed))} could not write", pending.error)
        else:
            self._commit(pending, len(reports))
        return not failed

    def finish(self) -> bool:
        """Wait until what is being written is committed or given up, on every rank; True when it is committed."""
        if self._pending is None:
            return True
        self._pending.thread.join()
        mine = torch.tensor([self.report()], dtype=torch.int64)
        made = self.advance([int(r) for r in distributed.all_gather_tensor(mine)])
        distributed.barrier()
        return made

    def _write(self, pieces: Sequence[Piece], total_bytes: int) -> None:
        pending = self._pending
        try:
            require_space(self._store, total_bytes)
            pending.folder.mkdir(parents=True, exist_ok=True)
            write_shard(pending.folder, distributed.rank(), pieces)
        except BaseException as error:  # raised again, or reported, on the main thread
            pending.error = error

    @distributed.on_main
    def _commit(self, pending: _Pending, ranks: int) -> None:
        self._lease.verify()
        try:
            path = self._store.commit(pending.folder, pending.images_seen, ranks, pending.state)
        except (OSError, CheckpointError) as error:
            self._remove(pending, "it could not be committed", error)
            return
        try:
            gone = self._store.prune(*self._kept)
        except OSError as error:
            gone = []
            self._log.warning("old checkpoints in %s could not be removed (%s)", self._store.root, error)
        dropped = f", dropped {', '.join(f'{n:,}' for n in gone)}" if gone else ""
        self._log.info("checkpoint %s%s", path, dropped)

    def _give_up(self, pending: _Pending, reason: str, error: BaseException | None) -> None:
        if error is not None and not distributed.is_main():
            self._log.error("checkpoint at %s images: %s", f"{pending.images_seen:,}", error)
        self._remove(pending, reason, error)

    @distributed.on_main
    def _remove(self, pending: _Pending, reason: str, error: BaseException | None) -> None:
        shutil.rmtree(pending.folder, ignore_errors=True)
        self._log.warning(
            "no checkpoint at %s images: %s%s; training goes on, earlier checkpoints stay",
            f"{pending.images_seen:,}", reason, f" ({error})" if error else "",
        )  # fmt: skip


def require_space(store: Store, total_bytes: int) -> None:
    """OSError with one clear line when a checkpoint of total_bytes does not fit beside those that are there."""
    free = store.free()
    if free < total_bytes + _SPARE_BYTES:
        raise OSError(
            f"a checkpoint needs {total_bytes / 2**20:,.1f} MiB in {store.root} and {free / 2**20:,.1f} MiB are free; "
            "free some, or keep fewer (checkpoint.keep)"
        )


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory that later steps do not touch."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous().view(-1)
