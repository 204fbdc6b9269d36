"""The experts' products with SwiGLU in their epilogue: dsmoe::grouped_glu and its backward twin dsmoe::grouped_dglu.

On a GPU with wgmma (compute capability 9.0) each is one kernel, in bfloat16; elsewhere the same meaning is composed of
the other operations. Their torch operations are defined in kernels/csrc/grouped_ops.cpp.
"""

import torch
from torch import Tensor

from dsmoe.ops.native.registration import refuse_gradient
from dsmoe.ops.reference.grouped import rows_times_matrices

_SWIGLU = 0
Shared = tuple[Tensor, ...]


def declare() -> None:
    """What torch must know beside the kernels: fakes, the composition as the CPU's, no gradient. Called once."""
    for name, composed, fake in (("glu", _compose_glu, _fake_glu), ("dglu", _compose_dglu, _fake_dglu)):
        torch.library.impl(f"dsmoe::grouped_{name}", "CPU", composed)
        torch.library.register_fake(f"dsmoe::grouped_{name}", fake)
        refuse_gradient(f"dsmoe::grouped_{name}")


def grouped_glu(
    x: Tensor,
    order: Tensor | None,
    k: int,
    w_gate: Tensor,
    w_up: Tensor,
    ends: Tensor,
    gate: Tensor | None,
    keep: bool,
    shared: Shared | None = None,
) -> tuple[Tensor, ...]:
    """(a, h, up) of rows [R, F]: h = row w_gate[e].T, up = row w_up[e].T, a = gate * silu(h) * up.

    x [N, D] with order [R]: row r is x[order[r] // k]; without it x is the rows [R, D], k is 1. w_gate, w_up [E, F, D];
    ends int32 [E], the last one R; gate float32 [R] or None. Without keep h and up are empty. shared: gate and up
    matrices [Fs, D] of the shared expert, in the same launch (needs an order): then also its (a, h, up), [N, Fs].
    """
    beside = shared or (None, None)
    run = torch.ops.dsmoe.grouped_glu if _op_serves(x, w_gate, w_up, *beside) else _compose_glu
    found = run(x, order, k, w_gate, w_up, ends, gate, *beside, keep)
    return found if shared else found[:3]


def grouped_dglu(
    dy: Tensor,
    order: Tensor | None,
    k: int,
    w2: Tensor,
    ends: Tensor,
    h: Tensor,
    up: Tensor,
    gate: Tensor | None,
    again: bool,
    shared: Shared | None = None,
) -> tuple[Tensor, ...]:
    """(dh, dup, a, dgate) from dy [N, D] or its rows, by order as in grouped_glu: da = row of dy w2[e], w2 [E, D, F].

    a is the forward's once more, empty without `again`; dgate float32 [R] = <da, silu(h) * up>, empty without a gate.
    shared: matrix [D, Fs], h and up [N, Fs] of the shared expert: then also its (dh, dup, a).
    """
    beside = shared or (None, None, None)
    run = torch.ops.dsmoe.grouped_dglu if _op_serves(dy, w2, h, up, *beside) else _compose_dglu
    found = run(dy, order, k, w2, ends, h, up, gate, *beside, again)
    return found if shared else found[:4]


def _op_serves(first: Tensor, *others: Tensor | None) -> bool:
    """Whether the torch operation takes these: on a CPU all, on a GPU what launchers.h says."""
    if not first.is_cuda:
        return True
    given = [first, *(t for t in others if t is not None)]
    fits = all(t.dtype == torch.bfloat16 and t.numel() and not (t.shape[-1] % 8 or t.data_ptr() % 16) for t in given)
    return fits and torch.ops.dsmoe.has_wgmma(first)


# ---- the same, composed


def _gathered(x: Tensor, order: Tensor | None, k: int) -> Tensor:
    return x if order is None else x.index_select(0, order // k)


def _counts(ends: Tensor) -> Tensor:
    return ends.long().diff(prepend=ends.new_zeros(1))


def _compose_glu(x, order, k: int, w_gate, w_up, ends, gate, shared_gate, shared_up, keep: bool):
    rows, counts, none = _gathered(x, order, k), _counts(ends), x.new_empty(0)
    found = [(rows_times_matrices(rows, w_gate.mT, counts), rows_times_matrices(rows, w_up.mT, counts), gate)]
    if shared_gate is not None:
        found.append((x @ shared_gate.mT, x @ shared_up.mT, None))
    made = []
    for h, up, factor in found:
        a = torch.ops.dsmoe.expert_act(h, _SWIGLU, up, None, None, factor)
        made += [a, h, up] if keep else [a, none.clone(), none.clone()]
    return tuple(made) if len(made) == 6 else (*made, none, none.clone(), none.clone())


def _compose_dglu(dy, order, k: int, w2, ends, h, up, gate, shared_w2, shared_h, shared_up, again: bool):
    da = rows_times_matrices(_gathered(dy, order, k), w2, _counts(ends))
    dh, dup, _, dgate, a = torch.ops.dsmoe.expert_act_backward(da, h, _SWIGLU, up, None, None, gate, again)
    if shared_w2 is None:
        return dh, dup, a, dgate, *(dy.new_empty(0) for _ in range(3))
    beside = torch.ops.dsmoe.expert_act_backward(dy @ shared_w2, shared_h, _SWIGLU, shared_up, None, None, None, again)
    return dh, dup, a, dgate, beside[0], beside[1], beside[4]


# ---- fakes


def _fake_glu(x, order, k: int, w_gate, w_up, ends, gate, shared_gate, shared_up, keep: bool):
    own = (x.shape[0] * k, w_gate.shape[1])
    beside = (0,) if shared_gate is None else (x.shape[0], shared_gate.shape[0])
    return tuple(x.new_empty(shape if keep or i == 0 else (0,)) for shape in (own, beside) for i in range(3))


def _fake_dglu(dy, order, k: int, w2, ends, h, up, gate, shared_w2, shared_h, shared_up, again: bool):
    own = (dy.shape[0] * k, w2.shape[2])
    beside = (0,) if shared_w2 is None else (dy.shape[0], shared_w2.shape[1])
    dh, dup, a = (dy.new_empty(own if again or i < 2 else (0,)) for i in range(3))
    dgate = dy.new_empty((0,) if gate is None else own[:1], dtype=torch.float32)
    return dh, dup, a, dgate, *(dy.new_empty(beside if again or i < 2 else (0,)) for i in range(3))
