"""The gate: the only parameter that decides where tokens go."""

import math

import torch
from torch import Tensor, nn

from dsmoe import ops
from dsmoe.ops.initialize import initialize


class Gate(nn.Module):
    """Top-k softmax router with one weight [E, D], no bias, no noise."""

    def __init__(self, dim: int, num_experts: int, top_k: int, renormalize: bool) -> None:
        super().__init__()
        self.top_k = top_k
        self.renormalize = renormalize
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming uniform with a = sqrt(5), that is U(-1/sqrt(D), 1/sqrt(D)) (contracts 2.2)."""
        initialize(self.weight, lambda weight: nn.init.kaiming_uniform_(weight, a=math.sqrt(5)))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> ops.Routing:
        """x [N, D] -> Routing. bias [E] is added to the probabilities for the choice alone."""
        return ops.route(x, self.weight, self.top_k, self.renormalize, bias)
