"""Multi-resolution noise from given normal numbers. Not here: drawing them by sample index (tasks.noising)."""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LEVELS = 10


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """The largest grid (h, w) that each level can have, finest first; one level after the other down to a side of 1.

    Level i shrinks the grid of level i - 1 by r_i^i, r_i in [2, 4), so 2^i is the least.
    """
    sizes = [(height, width)]
    while min(sizes[-1]) > 1 and len(sizes) < MAX_LEVELS:
        shrink = 2 ** len(sizes)
        sizes.append((max(1, sizes[-1][0] // shrink), max(1, sizes[-1][1] // shrink)))
    return sizes


def multi_resolution(base: Tensor, levels: Sequence[Tensor], ratio: Tensor, strength: Tensor) -> Tensor:
    """base + sum_i strength^i up(level i), over its standard deviation, each sample for itself (contracts 4.5).

    base [B,C,h,w]; levels[i] [B,C,*level_sizes(h, w)[i]], of which a sample takes the corner that its own grid
    needs; all standard normal. ratio [B, len(levels)] in [2, 4): sample b's grid at level i is that of level i - 1
    over ratio[b, i]^i, rounded down, at least 1 (compounded, as published); its last level is the first with a side
    of 1. strength [B] in [0, 1]; at 0 only level 0 is added, so the noise is white. Bilinear, as
    torch.nn.functional.interpolate without align_corners. Returns fp32 [B,C,h,w]; published code divides by the
    deviation of the whole batch, which would make a sample depend on its neighbours (design decision 3).
    """
    height, width = base.shape[2:]
    rows = torch.full_like(ratio[:, 0], height, dtype=torch.int64)
    columns = torch.full_like(rows, width)
    weight = torch.ones_like(strength)
    total = base
    for i, level in enumerate(levels):
        shrink = ratio[:, i].double() ** i
        rows, columns = ((side / shrink).long().clamp(min=1) for side in (rows, columns))
        spread = _stretch(_stretch(level, rows, height, 2), columns, width, 3)
        total = total + weight.view(-1, 1, 1, 1) * spread
        weight = torch.where((rows > 1) & (columns > 1), weight * strength, 0.0)
    return total / total.flatten(1).std(1).view(-1, 1, 1, 1)


def _stretch(x: Tensor, sizes: Tensor, length: int, dim: int) -> Tensor:
    """The first sizes[b] lines of sample b along dim, bilinearly to `length` lines (half-pixel centres).

    Gathered line by line, so that samples of different sizes go in one call and none depends on another.
    """
    shape = [len(sizes), 1, 1, 1]
    shape[dim] = length
    centre = torch.arange(length, device=x.device) + 0.5
    place = (centre * (sizes[:, None] / length) - 0.5).clamp(min=0)
    low = place.long()
    high = torch.minimum(low + 1, sizes[:, None] - 1)
    part = (place - low).view(shape)
    below, above = (torch.take_along_dim(x, line.view(shape), dim) for line in (low, high))
    return below + part * (above - below)
