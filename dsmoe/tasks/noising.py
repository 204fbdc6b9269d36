"""At which time and with what noise a training sample is corrupted, drawn by sample index, for every task alike.

Not here: the corruption itself and its loss (diffusion), and everything a task adds of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe.base.diffusion import DiffusionSpec
from dsmoe.diffusion.noise import level_sizes, multi_resolution
from dsmoe.ops import random


@dataclass(frozen=True)
class Noising:
    """The recipe's times and noise. Every `index` is int64 [B] sample indices, on the device of the result."""

    spec: DiffusionSpec
    seed: int

    def times(self, index: Tensor) -> Tensor:
        """Discrete schedules: int64 [B], uniform over 0..timesteps-1. rectified_flow: fp32 [B] in (0, 1]."""
        if not self.spec.is_flow:
            return random.randint(self.seed, "timestep", index, self.spec.timesteps)
        if self.spec.time_density == "logit_normal":
            # In fp64, whose last bits, unlike fp32's, do not differ between a vector unit and the odd samples after it.
            return torch.sigmoid(random.normal(self.seed, "timestep", index).double()).float()
        return 1 - random.uniform(self.seed, "timestep", index)

    def noise(self, index: Tensor, shape: Sequence[int], times: Tensor) -> Tensor:
        """fp32 [B, *shape] for shape (C, h, w) at these times: standard normal, or of several resolutions."""
        base = random.normal(self.seed, "noise", index, shape)
        if self.spec.noise == "gaussian":
            return base
        channels, height, width = shape
        grids = [(channels, h, w) for h, w in level_sizes(height, width)]
        counts = [math.prod(grid) for grid in grids]
        drawn = random.normal(self.seed, "noise_levels", index, (sum(counts),)).split(counts, dim=1)
        levels = [part.view(-1, *grid) for part, grid in zip(drawn, grids, strict=True)]
        ratio = 2 + 2 * random.uniform(self.seed, "noise_ratio", index, (len(grids),))
        share = times if self.spec.is_flow else times / self.spec.timesteps
        return multi_resolution(base, levels, ratio, self.spec.noise_strength * share)
