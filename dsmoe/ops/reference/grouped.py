"""Grouped matrix product: consecutive runs of rows, each times the matrix of its own expert."""

import torch
from torch import Tensor


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor, *, transposed: bool = False) -> Tensor:
    """See dsmoe.ops.grouped_mm."""
    assert x.dtype == weight.dtype, f"rows are {x.dtype}, weights {weight.dtype}"
    return _GroupedMM.apply(x, weight, counts, transposed)


class _GroupedMM(torch.autograd.Function):
    """Saves the weight itself: under ZeRO-3 a saved view would keep the gathered matrix alive."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, counts: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        ctx.transposed = transposed
        return _rows_times_matrices(x, weight.mT if transposed else weight, counts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, counts = ctx.saved_tensors
        grad = grad.contiguous()  # a sum hands down an expanded gradient, which the library refuses
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _rows_times_matrices(grad, weight if ctx.transposed else weight.mT, counts)
        if ctx.needs_input_grad[1]:
            left, right = (grad, x) if ctx.transposed else (x, grad)
            dweight = _outer_products(left, right, counts)
        return dx, dweight, None, None


def _rows_times_matrices(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x[R,K], weight[E,K,M] -> [R,M]."""
    if _library_takes(x, weight):
        return torch._grouped_mm(x, weight, offs=_ends(counts))
    out = x.new_empty(x.shape[0], weight.shape[2])
    sizes = _sizes(counts, x.shape[0])
    for rows, matrix, into in zip(x.split(sizes), weight.unbind(), out.split(sizes), strict=True):
        torch.mm(rows, matrix, out=into)
    return out


def _outer_products(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """left[R,K], right[R,M] -> [E,K,M]: sums of outer products over an expert's rows, zeros without rows."""
    if _library_takes(left, right):
        return torch._grouped_mm(left.mT, right, offs=_ends(counts))
    out = left.new_empty(counts.shape[0], left.shape[1], right.shape[1])
    sizes = _sizes(counts, left.shape[0])
    for a, b, into in zip(left.split(sizes), right.split(sizes), out.unbind(), strict=True):
        torch.mm(a.mT, b, out=into)
    return out


def _sizes(counts: Tensor, rows: int) -> list[int]:
    """Rows of each expert; on the meta device, which holds no numbers, as even a split as there is."""
    if counts.is_meta:
        experts = counts.shape[0]
        return [rows * (e + 1) // experts - rows * e // experts for e in range(experts)]
    return counts.tolist()


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0, dtype=torch.int32)


def _library_takes(*operands: Tensor) -> bool:
    """Whether torch._grouped_mm serves these: bf16 on a GPU, not empty, strides and address in 16 bytes.

    There it spares a host synchronisation. On the CPU the loop is as fast (within 3 % at D 128 to 384, F 4D,
    E 8) and takes every dtype and size, so there is no second path.
    """
    return all(
        t.is_cuda
        and t.dtype == torch.bfloat16
        and t.numel() > 0
        and max(t.stride()[-2:]) % 8 == 0
        and t.data_ptr() % 16 == 0
        for t in operands
    )
