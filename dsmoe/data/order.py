"""Which image, mirrored or not, each slot of each global batch gets: functions of (seed, sample index) alone.

A sample index n counts images over the whole run: step s takes n = s*global_batch ... (s+1)*global_batch - 1.
Not here: reading the images (loader) and the draws of the diffusion objective (tasks).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe.base.errors import ConfigError
from dsmoe.ops import random

CACHED_EPOCHS = 2  # one batch may end an epoch and begin the next


class SampleOrder:
    """Sample index n -> item: epoch n // num_items is a permutation of all items, keyed by (seed, epoch)."""

    def __init__(self, seed: int, num_items: int) -> None:
        assert num_items > 0, num_items
        self.seed = seed
        self.num_items = num_items
        self._epochs: dict[int, Tensor] = {}

    def items(self, index: Tensor) -> Tensor:
        """int64 [B] sample indices >= 0 -> int64 [B] items; on the CPU."""
        epochs, places = index // self.num_items, index % self.num_items
        out = torch.empty_like(index)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            out[here] = self._permutation(epoch)[places[here]]
        return out

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            while len(self._epochs) >= CACHED_EPOCHS:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = random.permutation(self.seed, epoch, self.num_items)
        return self._epochs[epoch]


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """How a global batch is cut: rank of world_size, micro_batch images a forward pass."""

    global_batch: int
    micro_batch: int
    world_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, self
        at_once = self.world_size * self.micro_batch
        if at_once < 1 or self.global_batch < 1 or self.global_batch % at_once:
            raise ConfigError(
                f"train.global_batch {self.global_batch} is not a multiple of micro-batch {self.micro_batch} "
                f"x {self.world_size} ranks; change one of the three."
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one optimizer step."""
        return self.global_batch // (self.world_size * self.micro_batch)


def micro_batch(step: int, accumulation_index: int, rank: int, world: int, micro: int, global_batch: int) -> Tensor:
    """int64 [micro] sample indices of one rank's micro-batch.

    They are the slots accumulation_index*world*micro + rank*micro + j of the step's global batch.
    """
    first = step * global_batch + (accumulation_index * world + rank) * micro
    return torch.arange(first, first + micro)


@dataclass(frozen=True)
class Request:
    """What one micro-batch must hold: sample indices int64 [B], items int64 [B], mirrored bool [B]."""

    index: Tensor
    items: Tensor
    flips: Tensor


def requests(
    order: SampleOrder, layout: BatchLayout, *, start_step: int, num_steps: int, flip: bool
) -> Iterator[Request]:
    """One rank's micro-batches of steps start_step ... start_step + num_steps - 1, in the order of training.

    flip: mirror each sample with probability 1/2, drawn by its index under the order's seed.
    """
    for step in range(start_step, start_step + num_steps):
        for accumulated in range(layout.accumulation):
            index = micro_batch(
                step, accumulated, layout.rank, layout.world_size, layout.micro_batch, layout.global_batch
            )
            flips = torch.zeros(len(index), dtype=torch.bool)
            if flip:
                flips = random.uniform(order.seed, "flip", index, ()) < 0.5
            yield Request(index, order.items(index), flips)
