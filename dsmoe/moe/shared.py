"""The shared expert: a SwiGLU network every token passes."""

from torch import Tensor, nn

from dsmoe import ops


class SharedExpert(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases, no router weight (contracts 2.2). Xavier uniform weights."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.down_proj(ops.expert_act(self.gate_proj(x), "swiglu", self.up_proj(x)))
