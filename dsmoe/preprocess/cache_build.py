"""Building a latent cache with any number of ranks: who makes which shard, how it is encoded, how it ends.

Ranks claim whole shards from one counter, so no two write one file and a slow rank holds nobody up; they never meet in
a collective, whose time limit a long shard could outlast. What a shard holds depends on the header alone: it is
encoded in batches of one size, cut at multiples of it, the last one padded.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsmoe.base.errors import DataError, TrainingFailure, UserError
from dsmoe.base.run_folder import Lease
from dsmoe.codec.protocol import Codec
from dsmoe.data.dataset import Fault, FaultReporter, ImageDataset
from dsmoe.data.latent_cache import DTYPES, CacheHeader
from dsmoe.data.loader import ReadBatch, read_batches
from dsmoe.data.order import Request
from dsmoe.preprocess.cache_folder import CacheFolder
from dsmoe.preprocess.memory import encode_views
from dsmoe.runtime import distributed
from dsmoe.runtime.logging import Progress, get_logger
from dsmoe.runtime.stopping import StopRequest

POLL_SECONDS = 0.1
STALL_SECONDS = 1200.0  # without an image from any rank: one has gone without a word
LEAVE_SECONDS = 5.0  # rank 0 holds the board for so long after a failure, for the others to read


@dataclass(kw_only=True)
class Job:
    """One rank's part in building a cache. codec lies on `device`; workers: loader processes of this rank."""

    folder: CacheFolder
    dataset: ImageDataset
    codec: Codec
    device: torch.device
    workers: int
    stop: StopRequest
    board: distributed.Board = field(default_factory=lambda: distributed.Board("latent cache"))
    progress: Progress | None = None

    @property
    def header(self) -> CacheHeader:
        """What is built."""
        return self.folder.header


def build(job: Job) -> bool:
    """Make what is missing; True once the cache is complete, False when a rank was asked to stop before.

    Every rank calls it and gets the same answer, or raises: UserError of any rank on all, TrainingFailure when another
    job has taken the folder over or a rank has gone.
    """
    try:
        lease = _open(job)
        if lease is None:
            return True
        _make_shards(job, lease)
        job.board.add("ended")
        _wait(job, lambda: job.board.count("ended") == distributed.world_size())
        if job.board.count("made") < job.header.shards:
            return False
        _close(job, lease)
    except Exception as error:
        _tell_others(job.board, error)
        raise
    return True


def _open(job: Job) -> Lease | None:
    """The lease, taken by rank 0; None when the cache is complete already."""
    if distributed.is_main():
        complete = job.folder.check()
        if complete:
            job.folder.clear()
            get_logger().info("%s is complete; nothing to do", job.folder.path)
        else:
            needed, free = job.folder.needed()
            get_logger().info(
                "%d images, %d shards: needs %.3g GiB, %.3g GiB are free",
                job.header.items, job.header.shards, needed / 2**30, free / 2**30,
            )  # fmt: skip
            job.folder.require_space()
            lease = job.folder.start()
            left = needed // job.header.item_bytes
            if left < job.header.items:
                get_logger().info("%d images are there already", job.header.items - left)
            job.progress = Progress("encoding", left, "images")
        job.board.post("lease", "" if complete else json.dumps([lease.generation, lease.holder]))
    _wait(job, lambda: job.board.line("lease") is not None)
    text = job.board.line("lease")
    return Lease(job.folder.lease_folder, *json.loads(text)) if text else None


def _make_shards(job: Job, lease: Lease) -> None:
    """Claim, encode and write shards until there are none left or a rank was asked to stop."""
    made: _Shard | None = None
    damageable = isinstance(job.dataset, FaultReporter)
    if damageable:
        job.dataset.account(len(job.dataset), ())  # a share of the whole set, whichever rank meets the damage
    reading = {"workers": job.workers, "pin_memory": job.device.type == "cuda"}
    with closing(read_batches(job.dataset, _claim(job), **reading)) as reads:
        for read in reads:
            made = made or _Shard(job.header, int(read.batch.items[0]) // job.header.shard_items)
            made.add(read, _encode(job, read.batch.images))
            if damageable:
                job.dataset.account(0, read.faults)
            job.board.add("images", len(read.batch.items))
            _look_up(job)
            if made.is_full:
                _write(job, made, lease)
                made = None
                if job.board.count("stop"):
                    return


def _claim(job: Job) -> Iterator[Request]:
    """Encoding batches of one claimed shard after the other; a finished one is kept when its every byte is right."""
    while not job.board.count("stop") and (shard := job.board.add("claimed") - 1) < job.header.shards:
        if job.folder.stated(shard) is not None:
            if job.folder.is_whole(shard):
                job.board.add("made")
                continue
            get_logger().warning("%s is damaged and made again", job.header.shard_name(shard))
        for items in torch.tensor(job.header.shard_range(shard)).split(job.header.encode_batch):
            yield Request(items, items, torch.zeros_like(items, dtype=torch.bool))


def _encode(job: Job, images: Tensor) -> Tensor:
    """images uint8 [b, 3, H, W] -> [b, views, moments, C, h, w] on the CPU, in the cache's dtype."""
    missing = job.header.encode_batch - len(images)
    # The library may sum in another order for another batch size.
    whole = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]) if missing else images
    posterior = encode_views(job.codec, whole.to(job.device), job.header.views)
    kept = [posterior.mean] if job.header.deterministic else [posterior.mean, posterior.std]
    moments = torch.stack(kept, 2)[: len(images)].to(DTYPES[job.header.dtype]).cpu()
    if not moments.isfinite().all():
        raise DataError(
            f"codec {job.codec.name} gives latents that are not finite in {job.header.dtype}; the shard is "
            "not kept. Check the codec's files, or take another --dtype."
        )
    return moments


class _Shard:
    """A shard in memory while it fills up, batch by batch in item order."""

    def __init__(self, header: CacheHeader, number: int) -> None:
        shape = header.shard_shape(number)
        self.number, self._filled = number, 0
        self.faults: list[Fault] = []
        self.tensors = {
            "moments": torch.zeros(shape, dtype=DTYPES[header.dtype]),
            "labels": torch.zeros(shape[0], dtype=torch.int64),
            "damaged": torch.zeros(shape[0], dtype=torch.bool),
        }
        self._first = header.shard_range(number).start

    def add(self, read: ReadBatch, moments: Tensor) -> None:
        """The next items."""
        here = slice(self._filled, self._filled + len(moments))
        self.tensors["moments"][here] = moments
        self.tensors["labels"][here] = read.batch.labels
        self.tensors["damaged"][[fault.item - self._first for fault in read.faults]] = True
        self.faults += read.faults
        self._filled = here.stop

    @property
    def is_full(self) -> bool:
        return self._filled == len(self.tensors["labels"])


def _write(job: Job, made: _Shard, lease: Lease) -> None:
    try:
        job.folder.write(made.number, made.tensors, made.faults, lease)
    except OSError as error:
        lease.verify()  # a later job removes what an earlier one has not finished
        raise DataError(
            f"{job.folder.path / job.header.shard_name(made.number)} cannot be written ({error.strerror or error}); "
            "the finished shards stay: mend it and give the same command again."
        ) from error
    job.board.add("made")


def _close(job: Job, lease: Lease) -> None:
    """Rank 0 judges the damage of the whole set and seals the cache; the others wait for it."""
    if distributed.is_main():
        faults = job.folder.faults()
        if isinstance(job.dataset, FaultReporter):
            job.dataset.account(len(job.dataset), faults)
        job.folder.complete(lease)
        job.progress.finish()
        if faults:
            first = ", ".join(fault.name for fault in faults[:5])
            get_logger("data").warning("stand-ins for %d damaged images, the first: %s", len(faults), first)
        job.board.add("sealed")
    _wait(job, lambda: job.board.count("sealed") == 1)


def _wait(job: Job, until: Callable[[], bool]) -> None:
    """Return when it is so; meanwhile rank 0 tells how far the whole job is."""
    images, since = -1, time.monotonic()
    while not until():
        _look_up(job)
        if (now := job.board.count("images")) != images:
            images, since = now, time.monotonic()
        elif time.monotonic() - since > STALL_SECONDS:
            raise TrainingFailure(
                f"no rank has encoded an image for {STALL_SECONDS / 60:.0f} minutes; one must be gone."
            )
        time.sleep(POLL_SECONDS)


def _look_up(job: Job) -> None:
    """Pass on a request to stop, end with a rank that failed, print progress when it is time."""
    if job.stop.asked:
        job.board.add("stop")
    if (line := job.board.line("failure")) is not None:
        kind, _, text = line.partition(" ")
        raise (DataError if kind == "user" else TrainingFailure)(text)
    if job.progress is not None:
        job.progress.update(job.board.count("images") - job.progress.done)


def _tell_others(board: distributed.Board, error: Exception) -> None:
    """Post what went wrong here, unless it came from the board, and give the others time to read it."""
    with contextlib.suppress(TrainingFailure):  # rank 0 has gone, and the board with it
        _post_failure(board, error)


def _post_failure(board: distributed.Board, error: Exception) -> None:
    if board.line("failure") is None:
        kind = "user" if isinstance(error, UserError) else "other"
        text = str(error) if isinstance(error, UserError | TrainingFailure) else f"{type(error).__name__}: {error}"
        board.post("failure", f"{kind} {text}")
    board.add("left")
    until = time.monotonic() + LEAVE_SECONDS
    while distributed.is_main() and board.count("left") < distributed.world_size() and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
