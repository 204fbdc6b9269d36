"""What the experts' operation (ffn.py) is made of on every device: its arguments, its two ends, the shared expert."""

from typing import NamedTuple

import torch
from torch import Tensor

from dsmoe.ops import products
from dsmoe.ops.native.registration import DTYPE_CODES

SWIGLU = 0


class Places(NamedTuple):
    """Where tokens go: the fields of these names of a Routing."""

    gates: Tensor
    indices: Tensor
    order: Tensor
    position: Tensor
    counts: Tensor
    ends: Tensor

    def row_gates(self) -> Tensor:
        """Gates [R], float32, in the order of rows."""
        return self.gates.reshape(-1).index_select(0, self.order)

    def spread_gates(self, experts: int) -> Tensor:
        """Gates as a matrix [N, E], zero for experts that were not chosen."""
        return self.gates.new_zeros(self.gates.shape[0], experts).scatter_(1, self.indices, self.gates)


class Weights(NamedTuple):
    """The routed experts' stacks; the shared expert's s1 [Fs, D], s2 [D, Fs], s3 [Fs, D], None without one."""

    w1: Tensor
    w2: Tensor
    w3: Tensor
    s1: Tensor | None = None
    s2: Tensor | None = None
    s3: Tensor | None = None

    def biases(self) -> tuple[Tensor, Tensor]:
        """b1 [E, F] and b2 [E, D] of GELU experts."""
        return self.w3[:, 0].split((self.w1.shape[1], self.w1.shape[2]), dim=-1)


class End(NamedTuple):
    """What becomes of the experts' sum: residual [N, D] + ada_gate [B, D] times it. keep_branch: the sum is handed out
    too, for the gate's gradient."""

    residual: Tensor | None
    ada_gate: Tensor | None
    keep_branch: bool


class Kept(NamedTuple):
    """From forward to backward: first products of the routed experts [R, F] and of the shared one [N, Fs], None where
    they are to be computed again; the sum [N, D] before the adaLN gate, if the gate wants a gradient."""

    h: Tensor | None
    up: Tensor | None
    shared_h: Tensor | None
    shared_up: Tensor | None
    branch: Tensor | None


# ---- ends


def finish(
    rows: Tensor, to: Places, add: Tensor | None, second_biases: Tensor | None, end: End
) -> tuple[Tensor, Tensor]:
    """Sum of a token's rows, `add`, and gates times second biases [E, D], ended by `end`. In float32, rounded once.
    Also the sum before the adaLN gate, or nothing."""
    residual, ada_gate, keep_branch = end
    if second_biases is None:
        return torch.ops.dsmoe.sum_rows(rows, to.position, None, add, residual, ada_gate, False, keep_branch)
    total = torch.ops.dsmoe.sum_rows(rows, to.position, None, add, None, None, True, False)[0]
    total.addmm_(to.spread_gates(second_biases.shape[0]), second_biases.float())
    branch = total.to(rows.dtype, copy=True) if keep_branch else rows.new_empty(0)
    if ada_gate is not None:
        images, dim = ada_gate.shape
        total.view(images, total.shape[0] // max(images, 1), dim).mul_(ada_gate[:, None])
    if residual is not None:
        total += residual
    return total.to(rows.dtype), branch


def begin_backward(
    dy: Tensor, to: Places, branch: Tensor | None, ada_gate: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows [R, D], where `wanted` of their sum [N, D], and of `ada_gate` (nothing without branch)."""
    if ada_gate is None:
        return torch.ops.dsmoe.gather_rows(dy, to.order, to.position), dy, dy.new_empty(0)
    rows, _, dsum, dada = torch.ops.dsmoe.sum_rows_backward(
        dy, to.position, DTYPE_CODES[dy.dtype], None, None, branch, ada_gate, wanted
    )
    return rows, dsum, dada


def sum_backward(dy: Tensor, branch: Tensor | None, ada_gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of the experts' sum [N, D], and of `ada_gate` (nothing without branch)."""
    if ada_gate is None:
        return dy, dy.new_empty(0)
    itself = torch.arange(dy.shape[0], device=dy.device)[:, None]
    dsum, _, _, dada = torch.ops.dsmoe.sum_rows_backward(
        dy, itself, DTYPE_CODES[dy.dtype], None, None, branch, ada_gate, False
    )
    return dsum, dada


def back_to_tokens(drows: Tensor, dgate: Tensor, dshared: Tensor | None, to: Places) -> tuple[Tensor, Tensor]:
    """dx [N, D], the shared expert's part added, and dgates [N, k] from the gradients of rows."""
    dx = torch.ops.dsmoe.sum_rows(drows, to.position, None, dshared, None, None, False, False)[0]
    return dx, dgate.index_select(0, to.position.reshape(-1)).view(to.position.shape)


def bias_gradients(dsum: Tensor, to: Places, b2: Tensor) -> tuple[Tensor, Tensor]:
    """What the second bias adds to the gradient of the gates [N, k], and its own gradient [E, D], float32."""
    wide = dsum.float()
    return (wide @ b2.float().mT).gather(1, to.indices), to.spread_gates(b2.shape[0]).mT @ wide


# ---- the shared expert


def shared_forward(x: Tensor, w: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """s2 (silu(s1 x) * s3 x) of tokens x [N, D], and its first products [N, Fs]."""
    h, up = shared_first_products(x, w)
    return shared_second_product(torch.ops.dsmoe.expert_act(h, SWIGLU, up, None, None, None), w), h, up


def shared_first_products(x: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    """h and up [N, Fs]."""
    h, up = (x.new_empty(x.shape[0], w.s1.shape[0]) for _ in range(2))
    products.mm(x, w.s1.mT, h)
    products.mm(x, w.s3.mT, up)
    return h, up


def shared_second_product(a: Tensor, w: Weights) -> Tensor:
    """s2 a, [N, D]."""
    y = a.new_empty(a.shape[0], w.s2.shape[0])
    products.mm(a, w.s2.mT, y)
    return y


def shared_backward(
    dsum: Tensor, x: Tensor, w: Weights, h: Tensor | None, up: Tensor | None, weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx [N, D] and, where wanted, the gradients of s1, s2, s3; h and up are made again where they were not kept."""
    if h is None:
        h, up = shared_first_products(x, w)
    da = torch.empty_like(h)
    products.mm(dsum, w.s2, da)
    dh, dup, _, _, a = torch.ops.dsmoe.expert_act_backward(da, h, SWIGLU, up, None, None, None, weights)
    made = [dh, dup, a]
    del da, dh, dup, a
    return shared_weights_backward(dsum, x, w, made, weights)


def shared_weights_backward(
    dsum: Tensor, x: Tensor, w: Weights, made: list[Tensor | None], weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As shared_backward, from `made`: the gradients of the first products and the activation. The list is emptied, so
    that each is freed after its last use."""
    ds1, ds2, ds3 = (torch.empty_like(s) if weights else x.new_empty(0) for s in (w.s1, w.s2, w.s3))
    a = made.pop()
    if weights:
        products.mm(dsum.mT, a, ds2)
    del a
    dup, dh = made.pop(), made.pop()
    if weights:
        products.mm(dh.mT, x, ds1)
    dx = torch.empty_like(x)
    products.mm(dh, w.s1, dx)
    del dh
    products.addmm(dx, dup, w.s3, dx)
    if weights:
        products.mm(dup.mT, x, ds3)
    return dx, ds1, ds2, ds3


def no_gradients(like: Tensor, count: int) -> tuple[Tensor, ...]:
    """Empty results: an operation may return neither None nor one tensor twice."""
    return tuple(like.new_empty(0) for _ in range(count))
