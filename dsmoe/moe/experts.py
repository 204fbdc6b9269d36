"""The routed experts: three stacked tensors, applied to rows that are already sorted by expert."""

import torch
from torch import Tensor, nn

from dsmoe import ops
from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.base.presets import EXPERT_KINDS


class Experts(nn.Module):
    """E feed-forward networks D -> F -> D in exactly three tensors (design 4), each matrix stored [out, in].

    swiglu: w2 @ (silu(w1 @ x) * (w3 @ x)); w1 gate, w3 up, both [E, F, D]; w2 down [E, D, F]; no biases.
    gelu:   w2 @ gelu_tanh(w1 @ x + b1) + b2; w1 [E, F, D], w2 [E, D, F]; w3 [E, 1, F + D] holds b1 | b2.
    """

    def __init__(self, kind: str, num_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        if kind not in EXPERT_KINDS:
            raise ConfigError(choose_from("model.expert_kind", kind, EXPERT_KINDS))
        self.kind = kind
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        third = (num_experts, hidden, dim) if kind == "swiglu" else (num_experts, 1, hidden + dim)
        self.w3 = nn.Parameter(torch.empty(third))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform for each expert's matrix by itself, zero biases."""
        matrices = (self.w1, self.w2, self.w3) if self.kind == "swiglu" else (self.w1, self.w2)
        for stack in matrices:
            for matrix in stack.detach().unbind():
                nn.init.xavier_uniform_(matrix)
        if self.kind == "gelu":
            nn.init.zeros_(self.w3)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [R, D], the first counts[0] for expert 0 and so on -> [R, D]. counts int64 [E]."""
        h = ops.grouped_mm(rows, self.w1, counts, transposed=True)
        if self.kind == "swiglu":
            up = ops.grouped_mm(rows, self.w3, counts, transposed=True)
            return ops.grouped_mm(ops.expert_act(h, "swiglu", up), self.w2, counts, transposed=True)
        b1, b2 = self.w3[:, 0].split((self.w1.shape[1], self.w1.shape[2]), dim=-1)
        a = ops.expert_act(ops.add_expert_bias(h, b1, counts), "gelu")
        return ops.add_expert_bias(ops.grouped_mm(a, self.w2, counts, transposed=True), b2, counts)
