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
MAX_LANES = 64
WINDOW_BLOCKS = 4


class SampleOrder:
    """Sample index n -> item: epoch n // num_items is a permutation of all items, keyed by (seed, epoch).

    block 0: every item goes anywhere. block b > 0 keeps neighbours together, for storage that reads them faster: runs
    of b consecutive items are shuffled as blocks, the sequence of blocks is cut into as many even pieces as there are
    lanes, and within each WINDOW_BLOCKS blocks of a piece the items are shuffled. Slot s of every global batch belongs
    to lane s * lanes // global_batch, which walks its own piece. So ranks, whose slots are consecutive, read blocks of
    their own (but for those that the cuts divide), and the batches are the same on any number of ranks.
    """

    def __init__(self, seed: int, num_items: int, *, block: int = 0, global_batch: int = 1) -> None:
        assert num_items > 0, num_items
        assert block >= 0, block
        self.seed = seed
        self.num_items = num_items
        self.block = block
        self.global_batch = global_batch
        self.lanes = max(n for n in range(1, min(MAX_LANES, global_batch) + 1) if global_batch % n == 0)
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
            make = self._blockwise if self.block else random.permutation
            self._epochs[epoch] = make(self.seed, epoch, self.num_items)
        return self._epochs[epoch]

    def _blockwise(self, seed: int, epoch: int, total: int) -> Tensor:
        """The items of one epoch in the order of its sample indices, int64 [total]."""
        blocks = random.permutation(seed, epoch, -(-total // self.block), purpose="block_order")
        sequence = (blocks[:, None] * self.block + torch.arange(self.block)).flatten()
        sequence = sequence[sequence < total]  # the last block may be short
        # An epoch may begin within a global batch, so lanes get their shares by counting slots.
        slots = (epoch * total + torch.arange(total)) % self.global_batch
        lane = slots * self.lanes // self.global_batch
        share = torch.bincount(lane, minlength=self.lanes)
        start = share.cumsum(0) - share
        place = torch.argsort(lane, stable=True)  # sample indices, lane by lane
        walked = torch.arange(total) - start.repeat_interleave(share)
        window = walked // (self.block * WINDOW_BLOCKS)
        # Shuffle within (lane, window): a stable sort by the two of what was shuffled as a whole.
        mixed = random.permutation(seed, epoch, total)
        group = lane[place] * (total + 1) + window
        mixed = mixed[torch.argsort(group[mixed], stable=True)]
        out = torch.empty_like(sequence)
        out[place] = sequence[mixed]
        return out


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

    A rank's slots are consecutive whatever the micro-batch, so that its lanes (SampleOrder) are its own: they are the
    slots rank*global_batch/world + accumulation_index*micro + j of the step's global batch.
    """
    first = step * global_batch + rank * (global_batch // world) + accumulation_index * micro
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
