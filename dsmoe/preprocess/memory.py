"""Latents of a small data set, encoded once and kept in memory; `posterior_of` takes these or images.

Not here: latents on disk, and who talks to whom (the caller gives `exchange`).
"""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe.base.errors import ConfigError
from dsmoe.codec.protocol import Codec, Posterior
from dsmoe.data.dataset import FaultReporter, ImageDataset
from dsmoe.data.loader import Batch, read_batches
from dsmoe.data.order import BatchLayout, Request, SampleOrder, requests
from dsmoe.data.transforms import to_float

DEFAULT_BUDGET = 4 << 30


@dataclass(frozen=True)
class LatentBatch:
    """A micro-batch of latents: posterior fp32 [B, C, h, w]; labels, index, items int64 [B] as in `Batch`."""

    posterior: Posterior
    labels: Tensor
    index: Tensor
    items: Tensor

    def to(self, device: torch.device | str) -> "LatentBatch":
        """On that device."""
        own = (self.posterior.mean, self.posterior.std, self.labels, self.index, self.items)
        mean, std, *rest = (t.to(device, non_blocking=True) for t in own)
        return LatentBatch(Posterior(mean, std), *rest)

    def pin_memory(self) -> "LatentBatch":
        """In page-locked memory."""
        own = (self.posterior.mean, self.posterior.std, self.labels, self.index, self.items)
        mean, std, *rest = (t.pin_memory() for t in own)
        return LatentBatch(Posterior(mean, std), *rest)


def posterior_of(batch: Batch | LatentBatch, codec: Codec) -> Posterior:
    """The posterior a batch carries, or that of its images (which lie on the codec's device)."""
    if isinstance(batch, LatentBatch):
        return batch.posterior
    return codec.encode(to_float(batch.images))


def encode_views(codec: Codec, images: Tensor, views: int) -> Posterior:
    """Posteriors fp32 [B, views, C, h, w], mirrored second, of images uint8 [B, 3, H, W]; all on the codec's device."""
    plain = to_float(images)
    found = [codec.encode(plain.flip(-1) if view else plain) for view in range(views)]
    return Posterior(torch.stack([p.mean for p in found], 1), torch.stack([p.std for p in found], 1))


class MemoryLatents:
    """Posterior mean and std of every item and view: plain, and mirrored when made with flip.

    mean, std: fp32 [N, V, C, h, w] on the CPU, V = 2 with flip or 1; labels: int64 [N].
    """

    def __init__(self, mean: Tensor, std: Tensor, labels: Tensor) -> None:
        assert mean.shape == std.shape, (mean.shape, std.shape)
        assert len(mean) == len(labels), (len(mean), len(labels))
        self.mean, self.std, self.labels = mean, std, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor, items: Tensor, flips: Tensor) -> LatentBatch:
        """The stored posteriors of items int64 [B], mirrored where flips bool [B]; index rides along."""
        view = flips.long()
        assert self.mean.shape[1] > 1 or not view.any(), "mirrored latents asked of a store made without flip"
        posterior = Posterior(self.mean[items, view], self.std[items, view])
        return LatentBatch(posterior, self.labels[items], index, items)

    def micro_batches(
        self,
        order: SampleOrder,
        layout: BatchLayout,
        *,
        start_step: int = 0,
        num_steps: int,
        flip: bool = False,
    ) -> Generator[LatentBatch, None, None]:
        """The same micro-batches, in the same order, as a `BatchLoader` with these arguments."""
        assert order.num_items == len(self), (order.num_items, len(self))
        for want in requests(order, layout, start_step=start_step, num_steps=num_steps, flip=flip):
            yield self.batch(want.index, want.items, want.flips)


@dataclass(frozen=True)
class EncodeProgress:
    """Of this rank's share: images done and in all, images a second so far, seconds left at that rate."""

    done: int
    total: int
    rate: float
    eta: float


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Which contiguous share of the items this process encodes, and how all shares reach all processes.

    exchange is an all-gather that every rank calls in the same order: a CPU tensor [m, ...], float32 or
    int64, of one shape on all ranks, to the concatenation [world_size * m, ...] by rank.
    """

    rank: int = 0
    world_size: int = 1
    exchange: Callable[[Tensor], Tensor] = lambda share: share

    def size(self, total: int) -> int:
        """Items in a share, the last ones padded."""
        return -(-total // self.world_size)

    def items(self, total: int) -> Tensor:
        """int64, this rank's share of 0..total-1; empty on the last ranks of a tiny set."""
        size = self.size(total)
        first = min(self.rank * size, total)
        return torch.arange(first, min(first + size, total))


ALONE = Sharing()


def latent_bytes(num_items: int, resolution: int, codec: Codec, flip: bool) -> int:
    """Bytes a process needs to hold the latents of a data set: mean and std, fp32, each view."""
    side = resolution // codec.factor
    return num_items * codec.channels * side * side * 4 * 2 * (2 if flip else 1)


def check_budget(num_items: int, resolution: int, codec: Codec, flip: bool, budget: int = DEFAULT_BUDGET) -> None:
    """ConfigError when the latents of a data set would take more than `budget` bytes in each process."""
    needed = latent_bytes(num_items, resolution, codec, flip)
    if needed > budget:
        raise ConfigError(
            f"codec.cache memory needs {needed / 2**30:.3g} GiB in each process for {num_items} images at "
            f"{resolution} pixels, the limit is {budget / 2**30:.3g} GiB; set codec.cache=none to encode "
            "while training."
        )


def encode_dataset(
    dataset: ImageDataset,
    codec: Codec,
    *,
    resolution: int,
    flip: bool = False,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    workers: int = 0,
    budget: int = DEFAULT_BUDGET,
    sharing: Sharing = ALONE,
    progress: Callable[[EncodeProgress], None] | None = None,
) -> MemoryLatents:
    """Encode every item once, and its mirror image with flip, shared out over ranks; every rank gets all.

    codec lies on `device`. budget: bytes of latents a process may hold, ConfigError above it, before anything
    is read. progress is called after each batch. DataError when too many items are damaged, on every rank.
    """
    total, views = len(dataset), 2 if flip else 1
    check_budget(total, resolution, codec, flip, budget)
    mine, share = sharing.items(total), sharing.size(total)
    side = resolution // codec.factor
    mean = torch.zeros(share, views, codec.channels, side, side)
    std = torch.zeros_like(mean)
    facts = torch.zeros(share, 2, dtype=torch.int64)  # label, and 1 where damaged
    wanted = [Request(part, part, torch.zeros_like(part, dtype=torch.bool)) for part in mine.split(batch_size)]
    start, done = time.monotonic(), 0
    for read in read_batches(dataset, wanted if len(mine) else [], workers=workers):
        here = slice(done, done + len(read.batch.items))
        posterior = encode_views(codec, read.batch.images.to(device), views)
        mean[here], std[here] = posterior.mean.cpu(), posterior.std.cpu()
        facts[here, 0] = read.batch.labels
        for fault in read.faults:
            facts[fault.item - int(mine[0]), 1] = 1
        done = here.stop
        if progress is not None:
            rate = done / max(time.monotonic() - start, 1e-9)
            progress(EncodeProgress(done, len(mine), rate, (len(mine) - done) / rate))
    facts = sharing.exchange(facts)[:total]
    _judge_faults(dataset, facts[:, 1])
    return MemoryLatents(sharing.exchange(mean)[:total], sharing.exchange(std)[:total], facts[:, 0].clone())


def _judge_faults(dataset: ImageDataset, damaged: Tensor) -> None:
    """Count the damaged items of all ranks at once, so that all ranks stop, or none.

    Each rank reads the others' damaged items again: that is quick, and gives it their names and reasons.
    """
    if not isinstance(dataset, FaultReporter):
        return
    dataset.drain_faults()
    for item in damaged.nonzero().flatten().tolist():
        dataset.read(item)
    dataset.account(len(damaged), dataset.drain_faults())
