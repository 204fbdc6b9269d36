"""The experts' operation with grouped products: all experts in one call of the library ("library"), or SwiGLU and the
shared expert inside the products as well ("glu"). The default on a GPU; "glu" runs on a CPU too, composed."""

import torch
from torch import Tensor

from dsmoe.ops.native import ffn_parts as parts
from dsmoe.ops.native.ffn_parts import SWIGLU, End, Kept, Places, Weights
from dsmoe.ops.native.glu import grouped_dglu, grouped_glu
from dsmoe.ops.reference.grouped import outer_products, rows_times_matrices
from dsmoe.runtime.device import beside

# ---- the library's products; the shared expert runs beside the routed ones


def forward(x: Tensor, to: Places, w: Weights, end: End, kind: int, keep: bool) -> tuple[Tensor, ...]:
    """y [N, D] and what is kept, as ffn.py defines the operation."""
    shared = None if w.s1 is None else beside(lambda x: parts.shared_forward(x, w), x)
    rows = torch.ops.dsmoe.gather_rows(x, to.order, to.position)
    h = rows_times_matrices(rows, w.w1.mT, to.counts)
    if kind == SWIGLU:
        up, b1, b2 = rows_times_matrices(rows, w.w3.mT, to.counts), None, None
    else:
        up, (b1, b2) = None, w.biases()
    a = torch.ops.dsmoe.expert_act(h, kind, up, b1, to.ends, to.row_gates())
    rows = rows_times_matrices(a, w.w2.mT, to.counts)
    add, *firsts = (None,) if shared is None else shared.result()
    y, branch = parts.finish(rows, to, add, b2, end)
    if not keep:
        return y, *parts.no_gradients(x, 4), branch
    return y, h, x.new_empty(0) if up is None else up, *(firsts or parts.no_gradients(x, 2)), branch


def backward(
    dy: Tensor, x: Tensor, to: Places, w: Weights, kept: Kept, ada_gate: Tensor | None, kind: int, weights: bool
) -> tuple[Tensor, ...]:
    """Gradients of x, gates, the six weights and ada_gate."""
    swiglu, h, up = kind == SWIGLU, kept.h, kept.up
    b1, b2 = (None, None) if swiglu else w.biases()
    dyr, dsum, dada = parts.begin_backward(dy, to, kept.branch, ada_gate, w.s1 is not None or not swiglu)
    given = (x, w, kept.shared_h, kept.shared_up, weights)
    shared = None if w.s1 is None else beside(lambda dsum: parts.shared_backward(dsum, *given), dsum)
    tokens = torch.ops.dsmoe.gather_rows(x, to.order, to.position) if weights or h is None else None
    if h is None:
        h = rows_times_matrices(tokens, w.w1.mT, to.counts)
        up = rows_times_matrices(tokens, w.w3.mT, to.counts) if swiglu else None
    da = rows_times_matrices(dyr, w.w2, to.counts)
    dh, dup, db1, dgate, a = torch.ops.dsmoe.expert_act_backward(da, h, kind, up, b1, to.ends, to.row_gates(), weights)
    del da
    dweights = list(parts.no_gradients(x, 3))
    if weights:
        dweights[:2] = outer_products(dh, tokens, to.counts), outer_products(dyr, a, to.counts)
        dweights[2] = outer_products(dup, tokens, to.counts) if swiglu else torch.empty_like(w.w3)
    del a, dyr, tokens
    drows = _first_products_backward(dh, dup if swiglu else None, to, w)
    dshared, *dw_shared = (None, *parts.no_gradients(x, 3)) if shared is None else shared.result()
    dx, dgates = parts.back_to_tokens(drows, dgate, dshared, to)
    if not swiglu:
        more, db2 = parts.bias_gradients(dsum, to, b2)
        dgates += more
        if weights:
            dweights[2][:, 0] = torch.cat([db1.float(), db2], dim=1)
    return dx, dgates, *dweights, *dw_shared, dada


def _first_products_backward(dh: Tensor, dup: Tensor | None, to: Places, w: Weights) -> Tensor:
    drows = rows_times_matrices(dh, w.w1, to.counts)
    if dup is not None:
        drows += rows_times_matrices(dup, w.w3, to.counts)
    return drows


# ---- SwiGLU and the shared expert in the products


def forward_glu(x: Tensor, to: Places, w: Weights, end: End, keep: bool) -> tuple[Tensor, ...]:
    """As forward, for SwiGLU experts."""
    a, h, up, shared_a, *firsts = _glu(x, to, w, keep)
    rows = rows_times_matrices(a, w.w2.mT, to.counts)
    add = None if w.s1 is None else parts.shared_second_product(shared_a, w)
    y, branch = parts.finish(rows, to, add, None, end)
    return y, h, up, *firsts, branch


def backward_glu(
    dy: Tensor, x: Tensor, to: Places, w: Weights, kept: Kept, ada_gate: Tensor | None, weights: bool
) -> tuple[Tensor, ...]:
    """As backward, for SwiGLU experts."""
    a = shared_a = None
    if kept.h is None:
        a, h, up, shared_a, shared_h, shared_up = _glu(x, to, w, True)
        kept = Kept(h, up, shared_h, shared_up, kept.branch)
    again, has_shared = weights and a is None, w.s1 is not None
    if weights or ada_gate is not None:
        dyr, dsum, dada = parts.begin_backward(dy, to, kept.branch, ada_gate, has_shared)
    else:
        dyr, dsum, dada = None, dy, dy.new_empty(0)
    # The shared expert's tiles take tokens. Without them, rows that exist already need not be gathered once more.
    given = (dsum, to.order, to.position.shape[1]) if has_shared or dyr is None else (dyr, None, 1)
    shared = (w.s2, kept.shared_h, kept.shared_up) if has_shared else None
    dh, dup, made, dgate, *of_shared = grouped_dglu(
        *given, w.w2, to.ends, kept.h, kept.up, to.row_gates(), again, shared
    )
    dshared, *dw_shared = None, *parts.no_gradients(x, 3)
    if has_shared:
        if not again:
            of_shared[2] = shared_a
        shared_a = None
        dshared, *dw_shared = parts.shared_weights_backward(dsum, x, w, of_shared, weights)
    dweights = parts.no_gradients(x, 3)
    if weights:
        dw2 = outer_products(dyr, made if again else a, to.counts)
        del a, made, dyr
        tokens = torch.ops.dsmoe.gather_rows(x, to.order, to.position)
        dweights = outer_products(dh, tokens, to.counts), dw2, outer_products(dup, tokens, to.counts)
        del tokens
    dx, dgates = parts.back_to_tokens(_first_products_backward(dh, dup, to, w), dgate, dshared, to)
    return dx, dgates, *dweights, *dw_shared, dada


def _glu(x: Tensor, to: Places, w: Weights, keep: bool) -> tuple[Tensor, ...]:
    """(a, h, up) of the routed experts and of the shared one, empty without it."""
    shared = None if w.s1 is None else (w.s1, w.s3)
    found = grouped_glu(x, to.order, to.position.shape[1], w.w1, w.w3, to.ends, to.row_gates(), keep, shared)
    return found if shared else (*found, *parts.no_gradients(x, 3))
