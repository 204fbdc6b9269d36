"""Grouped matrix product: consecutive runs of rows, each times the matrix of its own expert.

A torch operation of our own (dsmoe::grouped_mm) around library products: torch.compile sees one call whose result
shape is known, in any dtype and on any device, and every row that comes out was computed.
"""

import torch
from torch import Tensor

from dsmoe.ops import products


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor, *, transposed: bool = False) -> Tensor:
    """See dsmoe.ops.grouped_mm."""
    assert x.dtype == weight.dtype, f"rows are {x.dtype}, weights {weight.dtype}"
    return torch.ops.dsmoe.grouped_mm(x, weight, counts, transposed)


torch.library.define("dsmoe::grouped_mm", "(Tensor x, Tensor weight, Tensor counts, bool transposed) -> Tensor")
torch.library.define("dsmoe::grouped_outer", "(Tensor left, Tensor right, Tensor counts) -> Tensor")


@torch.library.impl("dsmoe::grouped_mm", "CompositeExplicitAutograd")
def _grouped_mm(x: Tensor, weight: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    return rows_times_matrices(x, weight.mT if transposed else weight, counts)


@torch.library.impl("dsmoe::grouped_outer", "CompositeExplicitAutograd")
def _grouped_outer(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    return outer_products(left, right, counts)


@torch.library.register_fake("dsmoe::grouped_mm")
def _(x: Tensor, weight: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 2])


@torch.library.register_fake("dsmoe::grouped_outer")
def _(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    return left.new_empty(counts.shape[0], left.shape[1], right.shape[1])


def _save(ctx, inputs, output) -> None:
    """Keeps the weight itself: under ZeRO-3 a saved view would keep the gathered matrix alive."""
    x, weight, counts, ctx.transposed = inputs
    ctx.save_for_backward(x, weight, counts)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight, counts = ctx.saved_tensors
    grad = grad.contiguous()  # a sum hands down an expanded gradient, which the library refuses
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.dsmoe.grouped_mm(grad, weight, counts, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        left, right = (grad, x) if ctx.transposed else (x, grad)
        dweight = torch.ops.dsmoe.grouped_outer(left, right, counts)
    return dx, dweight, None, None


def _refuse(ctx, grad: Tensor) -> None:
    raise RuntimeError("dsmoe::grouped_outer has no gradient: dsmoe's operations can be differentiated once.")


torch.library.register_autograd("dsmoe::grouped_mm", _backward, setup_context=_save)
torch.library.register_autograd("dsmoe::grouped_outer", _refuse)


def rows_times_matrices(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x[R,K], weight[E,K,M] -> [R,M]."""
    if _library_takes(x, weight):
        return torch._grouped_mm(x, weight, offs=_ends(counts))
    out = x.new_empty(x.shape[0], weight.shape[2])
    sizes = counts.tolist()
    for rows, matrix, into in zip(x.split(sizes), weight.unbind(), out.split(sizes), strict=True):
        products.mm(rows, matrix, into)
    return out


def outer_products(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """left[R,K], right[R,M] -> [E,K,M]: sums of outer products over an expert's rows, zeros without rows."""
    if _library_takes(left, right):
        return torch._grouped_mm(left.mT, right, offs=_ends(counts))
    out = left.new_empty(counts.shape[0], left.shape[1], right.shape[1])
    sizes = counts.tolist()
    for a, b, into in zip(left.split(sizes), right.split(sizes), out.unbind(), strict=True):
        products.mm(a.mT, b, into)
    return out


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
