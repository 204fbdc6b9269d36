"""What happens to expert rows between the matrix products: activations and per-expert biases."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dsmoe.base.presets import EXPERT_KINDS


def expert_act(h: Tensor, kind: str, up: Tensor | None = None) -> Tensor:
    """See dsmoe.ops.expert_act."""
    assert kind in EXPERT_KINDS, kind
    if kind == "gelu":
        return F.gelu(h, approximate="tanh")
    return F.silu(h) * up


def add_expert_bias(rows: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
    """See dsmoe.ops.add_expert_bias."""
    return _AddExpertBias.apply(rows, bias, counts)


class _AddExpertBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
        expert = torch.repeat_interleave(counts, output_size=rows.shape[0])
        ctx.save_for_backward(expert)
        ctx.bias = (bias.shape[0], bias.dtype)
        return rows + bias[expert]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (expert,) = ctx.saved_tensors
        num_experts, dtype = ctx.bias
        # The product with the membership matrix sums each expert's rows without atomics or a host wait.
        member = expert == torch.arange(num_experts, device=expert.device)[:, None]
        return grad, (member.to(grad.dtype) @ grad).to(dtype), None
