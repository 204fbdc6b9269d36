"""The shared expert: a SwiGLU network every token passes."""

from torch import Tensor, nn

from dsmoe import ops
from dsmoe.ops.initialize import initialize


class _XavierLinear(nn.Linear):
    """Xavier weights from birth: under zero.Init a child's weights are partitioned before its parent sees them."""

    def reset_parameters(self) -> None:
        initialize(self.weight, nn.init.xavier_uniform_)


class SharedExpert(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases, no router weight (contracts 2.2). Xavier uniform weights."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = _XavierLinear(dim, hidden, bias=False)
        self.up_proj = _XavierLinear(dim, hidden, bias=False)
        self.down_proj = _XavierLinear(hidden, dim, bias=False)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate [Fs, D], down [D, Fs] and up [Fs, D], as ops.moe_ffn takes them."""
        return self.gate_proj.weight, self.down_proj.weight, self.up_proj.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.down_proj(ops.expert_act(self.gate_proj(x), "swiglu", self.up_proj(x)))
