"""Tokens to expert rows and back: a gather and a sum, each the other's adjoint, without float atomics."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.ops.precision import maths_dtype


def gather_rows(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
    """See dsmoe.ops.gather_rows."""
    return _GatherRows.apply(x, order, position)


def sum_rows(
    rows: Tensor,
    order: Tensor,
    position: Tensor,
    gates: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
    narrow: bool = False,
) -> Tensor:
    """See dsmoe.ops.sum_rows."""
    total = _SumRows.apply(rows, order, position, gates)
    return finish_sum(total, rows.dtype, add, residual, ada_gate, narrow)


def finish_sum(
    total: Tensor,
    dtype: torch.dtype,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
    narrow: bool = False,
) -> Tensor:
    """What sum_rows does with the sum [N, D] of rows of this dtype."""
    if add is not None:
        total = total + add
    if ada_gate is not None:
        total = _AdaGate.apply(total, ada_gate, dtype)
    if residual is not None:
        total = total + residual
    return total.to(dtype) if narrow else total


class _AdaGate(torch.autograd.Function):
    """total [N,D] times ada_gate [B,D] of each token's image; keeps the total in `dtype`, where autograd would keep it
    in the wider one of the sum."""

    @staticmethod
    def forward(ctx, total: Tensor, ada_gate: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(total.to(dtype) if ctx.needs_input_grad[1] else None, ada_gate)
        return (_by_image(total, ada_gate) * ada_gate[:, None]).view(total.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        kept, ada_gate = ctx.saved_tensors
        by_image, dada = _by_image(grad, ada_gate), None
        if kept is not None:
            dada = (by_image * _by_image(kept, ada_gate)).sum(1).to(ada_gate.dtype)
        return (by_image * ada_gate[:, None]).view(grad.shape), dada, None


def _by_image(x: Tensor, ada_gate: Tensor) -> Tensor:
    """[N,D] as [B,N/B,D]."""
    images, dim = ada_gate.shape
    return x.reshape(images, x.shape[0] // max(images, 1), dim)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(position)
        return _gather(x, order, position)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (position,) = ctx.saved_tensors
        return _sum(grad, position, None).to(grad.dtype), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, position: Tensor, gates: Tensor | None) -> Tensor:
        ctx.save_for_backward(order, position, gates, None if gates is None else rows)
        ctx.rows_dtype = rows.dtype
        return _sum(rows, position, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        order, position, gates, rows = ctx.saved_tensors
        drows = _gather(grad, order, position)
        if gates is None:
            return drows.to(ctx.rows_dtype), None, None, None
        drows = drows * gates.flatten()[order][:, None]
        dgates = torch.stack([(grad * rows[row]).sum(-1) for row in position.unbind(1)], dim=1)
        return drows.to(ctx.rows_dtype), None, None, dgates.to(gates.dtype)


def _gather(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
    """x[N,D] -> rows[N*k,D]."""
    return x.index_select(0, order // position.shape[1])


def _sum(rows: Tensor, position: Tensor, gates: Tensor | None) -> Tensor:
    """rows[N*k,D] -> [N,D] in the maths dtype, the k terms added in slot order."""
    total = None
    for j, row in enumerate(position.unbind(1)):
        term = rows[row].to(maths_dtype(rows))
        if gates is not None:
            term = term * gates[:, j, None]
        total = term if total is None else total + term
    return total
