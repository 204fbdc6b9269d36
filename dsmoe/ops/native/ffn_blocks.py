"""SwiGLU experts on a CPU by kernels of our own (kernels/csrc/cpu/glu.h): an expert's rows in blocks, gathered
on the way, which go from the first product to the last without leaving the cache.

dsmoe::glu_experts(x [N, D], order [R] or None, k, gates [N, k] or None, counts [E], w1, w2, w3, keep) -> (rows [R, D],
h, up): row r is gates[order[r]] w2 (silu(w1 t) * w3 t) of token t = x[order[r] // k], or of x[r] without order. h and
up are kept in an order of the kernel's own, so only its backward can read them. dsmoe::glu_experts_backward takes dy
[N, D], what every row of a token gets, and returns dx [R, D], dgates [N, k] and the gradients of the weights.
"""

import torch
from torch import Tensor

from dsmoe.ops.native import ffn_parts as parts
from dsmoe.ops.native.ffn_parts import End, Kept, Places, Weights
from dsmoe.ops.native.registration import refuse_gradient


def declare() -> None:
    """What torch must know beside the kernels: fakes, no gradient. Called once."""
    for name, fake in (("glu_experts", _fake), ("glu_experts_backward", _fake_backward)):
        torch.library.register_fake(f"dsmoe::{name}", fake)
        refuse_gradient(f"dsmoe::{name}")


def forward(x: Tensor, to: Places, w: Weights, end: End, keep: bool) -> tuple[Tensor, ...]:
    """y [N, D] and what is kept, as ffn.py defines the operation."""
    rows, h, up = torch.ops.dsmoe.glu_experts(x, to.order, to.position.shape[1], to.gates, to.counts, *w[:3], keep)
    add, *firsts = None, *parts.no_gradients(x, 2)
    if w.s1 is not None:
        add, *firsts = torch.ops.dsmoe.glu_experts(x, None, 1, None, _all(x), *_stacks(w), keep)
    y, branch = parts.finish(rows, to, add, None, end)
    return y, h, up, *firsts, branch


def backward(
    dy: Tensor, x: Tensor, to: Places, w: Weights, kept: Kept, ada_gate: Tensor | None, weights: bool
) -> tuple[Tensor, ...]:
    """Gradients of x, gates, the six weights and ada_gate."""
    run = torch.ops.dsmoe.glu_experts_backward
    dsum, dada = parts.sum_backward(dy, kept.branch, ada_gate)
    dshared, dw_shared = None, parts.no_gradients(x, 3)
    if w.s1 is not None:  # first, because its scratch is the largest: all tokens are its rows
        first = (kept.shared_h, kept.shared_up)
        dshared, _, *made = run(dsum, x, None, 1, None, _all(x), *_stacks(w), *first, weights)
        dw_shared = [d[0] for d in made] if weights else made
    routed = (to.order, to.position.shape[1], to.gates, to.counts)
    rows, dgates, *dw = run(dsum, x, *routed, *w[:3], kept.h, kept.up, weights)
    dx = torch.ops.dsmoe.sum_rows(rows, to.position, None, dshared, None, None, False, False)[0]
    return dx, dgates, *dw, *dw_shared, dada


def _all(x: Tensor) -> Tensor:
    return torch.tensor([x.shape[0]], device=x.device)


def _stacks(w: Weights) -> tuple[Tensor, ...]:
    """The shared expert as a stack of one."""
    return tuple(matrix[None] for matrix in w[3:])


# ---- fakes


def _fake(x, order, k: int, gates, counts, w1, w2, w3, keep: bool):
    rows = x.shape[0] * k
    h, up = (x.new_empty((rows, w1.shape[1]) if keep else (0,)) for _ in range(2))
    return x.new_empty(rows, x.shape[1]), h, up


def _fake_backward(dy, x, order, k: int, gates, counts, w1, w2, w3, h, up, weights: bool):
    dgates = x.new_empty((0,) if gates is None else gates.shape, dtype=torch.float32)
    made = (x.new_empty(w.shape if weights else (0,)) for w in (w1, w2, w3))
    return x.new_empty(x.shape[0] * k, x.shape[1]), dgates, *made
