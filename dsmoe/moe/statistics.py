"""What a MoE layer reports about itself, and summaries of the load for logs."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DEAD_SHARE = 0.05  # of the fair share


class MoEStats(NamedTuple):
    """Losses and load of one call of a MoE layer (float32; the losses are float64 for float64 tokens).

    balance_loss     scalar, differentiable, without its coefficient: 1 at perfect balance; see moe.balance
    z_loss           scalar, differentiable, without its coefficient
    load             [E]     share of the N*k choices that went to each expert, detached; sums to 1
    importance       [E]     mean routing probability, detached; sums to 1
    load_per_sample  [B, E]  share of each sample's T*k choices, detached
    """

    balance_loss: Tensor
    z_loss: Tensor
    load: Tensor
    importance: Tensor
    load_per_sample: Tensor


def load_entropy(load: Tensor) -> Tensor:
    """Entropy of the load [..., E] over log E: 1 when all share alike, 0 when one takes all.

    1 for a single expert.
    """
    if load.shape[-1] == 1:
        return torch.ones_like(load[..., 0])
    entropy = -torch.special.xlogy(load, load).sum(-1)
    return entropy / math.log(load.shape[-1])


def load_imbalance(load: Tensor) -> Tensor:
    """Largest load [..., E] in units of the mean: 1 is balanced, E the worst."""
    return load.amax(-1) * load.shape[-1]


def dead_experts(load: Tensor, share: float = DEAD_SHARE) -> Tensor:
    """Which experts have a load [..., E] below `share` of the fair share 1/E: bool [..., E]."""
    return load < share / load.shape[-1]
