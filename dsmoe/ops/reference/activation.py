"""What happens to expert rows between the matrix products: activations and per-expert biases."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dsmoe.base.presets import EXPERT_KINDS


def expert_act(
    h: Tensor,
    kind: str,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    counts: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """See dsmoe.ops.expert_act."""
    assert kind in EXPERT_KINDS, kind
    if bias is not None:
        h = add_expert_bias(h, bias, counts)
    a = F.gelu(h, approximate="tanh") if kind == "gelu" else F.silu(h) * up
    return a if gate is None else _Gate.apply(a, gate)


def add_expert_bias(rows: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
    """See dsmoe.ops.add_expert_bias."""
    return _AddExpertBias.apply(rows, bias, counts)


class _Gate(torch.autograd.Function):
    """Rows times a number each, in the wider of the two dtypes, rounded once; autograd alone would keep wide copies."""

    @staticmethod
    def forward(ctx, rows: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gate)
        return (rows * gate[:, None]).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, gate = ctx.saved_tensors
        return (grad * gate[:, None]).to(rows.dtype), (grad.to(gate.dtype) * rows).sum(-1)


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
