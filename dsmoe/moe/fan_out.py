"""One tensor for several uses, with a gradient whose sum does not depend on the order in which they are done."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.ops.precision import maths_dtype


def fan_out(x: Tensor, uses: int) -> tuple[Tensor, ...]:
    """x for each of `uses`; the gradient is their sum in order, in float32, rounded once to the dtype of x.

    Autograd itself adds gradients as they come, each sum rounded. In bf16 that is another result under ZeRO-3, whose
    module hooks change which comes first.
    """
    return _FanOut.apply(x, uses)


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, uses: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(uses))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        came = [gradient for gradient in gradients if gradient is not None]
        if len(came) < 2:
            return (came[0] if came else None), None
        total = came[0].to(maths_dtype(came[0]))
        for gradient in came[1:]:
            total = total + gradient
        return total.to(came[0].dtype), None
