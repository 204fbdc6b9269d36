"""The routed experts: three stacked tensors, applied to rows that are already sorted by expert."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsmoe import ops
from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.base.presets import EXPERT_KINDS
from dsmoe.moe.shared import SharedExpert
from dsmoe.ops.initialize import initialize


def global_place(parameter: nn.Parameter, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Shape of the whole parameter, and where in it, flattened, this rank's experts begin.

    shape: the parameter's own here (a partitioned one does not show it). Other parameters are whole: (shape, 0).
    """
    first, total = getattr(parameter, "expert_range", (0, shape[0] if shape else 0))
    return (total, *shape[1:]), first * math.prod(shape[1:])


class End(NamedTuple):
    """How a token's sum over experts ends: residual [N, D] + ada_gate [B, D] * sum, each where it is given."""

    residual: Tensor | None = None
    ada_gate: Tensor | None = None


class Experts(nn.Module):
    """E feed-forward networks D -> F -> D in exactly three tensors (design 4), each matrix stored [out, in].

    held: which of the num_experts live here (all of them, or this rank's under expert parallelism); E below is
    their number.
    swiglu: w2 @ (silu(w1 @ x) * (w3 @ x)); w1 gate, w3 up, both [E, F, D]; w2 down [E, D, F]; no biases.
    gelu:   w2 @ gelu_tanh(w1 @ x + b1) + b2; w1 [E, F, D], w2 [E, D, F]; w3 [E, 1, F + D] holds b1 | b2.

    Set `recompute` to keep the input alone for the backward pass, and compute what lies between anew.
    """

    def __init__(self, kind: str, num_experts: int, dim: int, hidden: int, held: range | None = None) -> None:
        super().__init__()
        if kind not in EXPERT_KINDS:
            raise ConfigError(choose_from("model.expert_kind", kind, EXPERT_KINDS))
        self.kind, self.num_experts, self.recompute = kind, num_experts, False
        self.held = range(num_experts) if held is None else held
        count = len(self.held)
        self.w1 = nn.Parameter(torch.empty(count, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(count, dim, hidden))
        third = (count, hidden, dim) if kind == "swiglu" else (count, 1, hidden + dim)
        self.w3 = nn.Parameter(torch.empty(third))
        for stack in (self.w1, self.w2, self.w3):
            stack.expert_range = (self.held.start, num_experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform for each expert's matrix by itself, zero biases.

        The experts of other ranks are drawn too, one matrix at a time, and dropped: every rank's generator stays at
        the same place, and the whole model's weights do not depend on where experts live.
        """
        matrices = (self.w1, self.w2, self.w3) if self.kind == "swiglu" else (self.w1, self.w2)
        for stack in matrices:
            for expert in range(self.num_experts):
                here = expert in self.held
                matrix = stack.detach()[expert - self.held.start] if here else torch.empty_like(stack[0])
                initialize(matrix, nn.init.xavier_uniform_)
        if self.kind == "gelu":
            nn.init.zeros_(self.w3)

    def forward(
        self,
        x: Tensor,
        counts: Tensor,
        *,
        routing: ops.Routing | None = None,
        shared: SharedExpert | None = None,
        end: End | None = None,
    ) -> Tensor:
        """Rows x [R, D], the first counts[0] for expert 0 and so on -> [R, D], without gates. counts int64 [E].

        With `routing`, x [N, D] are tokens instead, and come back as sum_j gate_nj E_{index_nj}(x_n) + shared(x_n),
        ended by `end`, [N, D]. The shared expert's weights are read here, not given: so ZeRO-3 notices, and gathers
        them with this module's own (DeepSpeed's external parameters).
        """
        weights = (self.w1, self.w2, self.w3)
        if routing is None:
            return ops.expert_rows(x, counts, weights, self.kind, recompute=self.recompute)
        end = (end or End())._asdict()
        matrices = None if shared is None else shared.matrices()
        return ops.moe_ffn(x, routing, weights, self.kind, shared=matrices, **end, recompute=self.recompute)
