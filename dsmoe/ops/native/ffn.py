"""The routed experts from tokens to tokens as one operation and its backward, built on the compiled pieces.

The gate is folded into the activation (a_r = gate_r act(h_r)), so that the way back is a plain sum of rows, the
second product's result is not kept, and the gate's gradient falls out of the activation's backward. Kept for the
backward are the tokens, h and up; with `recompute` the tokens alone. Beside them, with `ada_gate`, the sum that it
multiplies, in the dtype of the tokens: what a gate of its own would keep. The products go by a `variant`, which is an
argument of the operation:

- "library": on a CPU the experts go one after the other, so that rows stay in the cache and temporaries are those of
  one expert; on a GPU all go through the library's grouped product.
- "glu": first product, SwiGLU and gate in one kernel, and the backward of the second with that of SwiGLU (glu.py).
"""

import torch
from torch import Tensor

from dsmoe.ops import products
from dsmoe.ops.native.glu import grouped_dglu, grouped_glu
from dsmoe.ops.native.registration import DTYPE_CODES, refuse_gradient
from dsmoe.ops.reference.grouped import outer_products, rows_times_matrices
from dsmoe.ops.reference.routing import Routing

_SWIGLU = 0
LIBRARY, GLU = "library", "glu"
_PLACES = "Tensor x, Tensor gates, Tensor indices, Tensor order, Tensor position, Tensor counts, Tensor ends"
_WEIGHTS = "Tensor w1, Tensor w2, Tensor w3"


def declare() -> None:
    """Define dsmoe::moe_ffn and its backward; called once, after the compiled pieces are registered."""
    define, implement = torch.library.define, torch.library.impl
    define(
        "dsmoe::moe_ffn",
        f"({_PLACES}, {_WEIGHTS}, Tensor? add, Tensor? residual, Tensor? ada_gate, int kind, str variant, bool keep, "
        "bool keep_branch) -> (Tensor y, Tensor h, Tensor up, Tensor branch)",
    )
    define(
        "dsmoe::moe_ffn_backward",
        f"(Tensor dy, {_PLACES}, {_WEIGHTS}, Tensor? h, Tensor? up, Tensor? branch, Tensor? ada_gate, int kind, "
        "str variant, bool weights, bool added) -> (Tensor dx, Tensor dgates, Tensor dw1, Tensor dw2, Tensor dw3, "
        "Tensor dadd, Tensor dada)",
    )
    for device, forward, backward in (
        ("CPU", _forward_by_expert, _backward_by_expert),
        ("CUDA", _forward_grouped, _backward_grouped),
    ):
        implement("dsmoe::moe_ffn", device, _by_variant(forward, _forward_glu))
        implement("dsmoe::moe_ffn_backward", device, _by_variant(backward, _backward_glu))
    torch.library.register_fake("dsmoe::moe_ffn", _fake)
    torch.library.register_fake("dsmoe::moe_ffn_backward", _fake_backward)
    torch.library.register_autograd("dsmoe::moe_ffn", _gradient, setup_context=_save)
    refuse_gradient("dsmoe::moe_ffn_backward")


def call(
    x: Tensor,
    to: Routing,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    kind: int,
    add: Tensor | None,
    residual: Tensor | None,
    ada_gate: Tensor | None,
    recompute: bool,
    variant: str,
) -> Tensor:
    """x[N,D] -> y[N,D]; see dsmoe.ops.moe_ffn. kind: 0 swiglu, 1 gelu. variant: of the products."""
    keep = torch.is_grad_enabled() and not recompute
    places = (to.gates, to.indices, to.order, to.position, to.counts, to.ends)
    keep_branch = ada_gate is not None and ada_gate.requires_grad and torch.is_grad_enabled()
    how = (kind, variant, keep, keep_branch)
    return torch.ops.dsmoe.moe_ffn(x, *places, w1, w2, w3, add, residual, ada_gate, *how)[0]


def _by_variant(library, glu):
    """An implementation that takes (..., kind, variant, flag, flag)."""

    def run(*arguments):
        *given, kind, variant, first, second = arguments
        if variant == GLU and kind == _SWIGLU:
            return glu(*given, first, second)
        if variant != LIBRARY:
            raise ValueError(f'moe_ffn: variant {variant!r}; "{LIBRARY}" serves all experts, "{GLU}" those of swiglu.')
        return library(*given, kind, first, second)

    return run


# ---- autograd and fakes


def _save(ctx, inputs, output):
    x, *places, w1, w2, w3, add, residual, ada_gate, ctx.kind, ctx.variant, keep, keep_branch = inputs
    _, h, up, branch = output
    kept = (h, up if ctx.kind == _SWIGLU else None) if keep else (None, None)
    ctx.save_for_backward(x, *places, w1, w2, w3, *kept, branch if keep_branch else None, ada_gate)
    ctx.add, ctx.residual, ctx.gated = add is not None, residual is not None, ada_gate is not None
    ctx.keep_branch = keep_branch
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy, *_):
    if dy is None:
        return (None,) * 17
    weights = any(ctx.needs_input_grad[7:10])
    dx, dgates, dw1, dw2, dw3, dadd, dada = torch.ops.dsmoe.moe_ffn_backward(
        dy.contiguous(), *ctx.saved_tensors, ctx.kind, ctx.variant, weights, ctx.add
    )
    dweights = (dw1, dw2, dw3) if weights else (None, None, None)
    dadd = (dadd if ctx.gated else dy) if ctx.add else None
    dresidual, dada = dy if ctx.residual else None, dada if ctx.keep_branch else None
    return dx, dgates, None, None, None, None, None, *dweights, dadd, dresidual, dada, None, None, None, None


def _fake(
    x, gates, indices, order, position, counts, ends, w1, w2, w3, add, residual, ada_gate,
    kind: int, variant: str, keep: bool, keep_branch: bool,
):  # fmt: skip
    hidden = (order.shape[0], w1.shape[1]) if keep else (0,)
    branch = x.new_empty(x.shape if keep_branch else (0,))
    return x.new_empty(x.shape), x.new_empty(hidden), x.new_empty(hidden if kind == _SWIGLU else (0,)), branch


def _fake_backward(
    dy, x, gates, indices, order, position, counts, ends, w1, w2, w3, h, up, branch, ada_gate,
    kind: int, variant: str, weights: bool, added: bool,
):  # fmt: skip
    given = (w1, w2, w3) if weights else ()
    made = [w.new_empty(w.shape) for w in given] or [x.new_empty(0) for _ in range(3)]
    dadd = x.new_empty(x.shape if added and ada_gate is not None else (0,))
    dada = x.new_empty((0,) if branch is None else ada_gate.shape)
    return x.new_empty(x.shape), gates.new_empty(gates.shape), *made, dadd, dada


# ---- pieces


def _row_gates(gates: Tensor, order: Tensor) -> Tensor:
    return gates.reshape(-1).index_select(0, order)


def _biases(w1: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
    """b1 [E, F] and b2 [E, D] of GELU experts."""
    return w3[:, 0].split((w1.shape[1], w1.shape[2]), dim=-1)


def _spread_gates(gates: Tensor, indices: Tensor, experts: int) -> Tensor:
    """Gates [N, k] as a matrix [N, E], zero for experts that were not chosen."""
    return gates.new_zeros(gates.shape[0], experts).scatter_(1, indices, gates)


def _finish(
    rows: Tensor,
    position: Tensor,
    add: Tensor | None,
    residual: Tensor | None,
    ada_gate: Tensor | None,
    second: tuple[Tensor, Tensor] | None,
    keep_branch: bool,
) -> tuple[Tensor, Tensor]:
    """Sum of a token's rows, `add`, and gates [N, E] times second biases [E, D]; times `ada_gate`, and `residual`. In
    float32, rounded once. Also the sum before `ada_gate`, or nothing."""
    if second is None:
        return torch.ops.dsmoe.sum_rows(rows, position, None, add, residual, ada_gate, False, keep_branch)
    total = torch.ops.dsmoe.sum_rows(rows, position, None, add, None, None, True, False)[0]
    total.addmm_(second[0], second[1].float())
    branch = total.to(rows.dtype, copy=True) if keep_branch else rows.new_empty(0)
    if ada_gate is not None:
        images, dim = ada_gate.shape
        total.view(images, total.shape[0] // max(images, 1), dim).mul_(ada_gate[:, None])
    if residual is not None:
        total += residual
    return total.to(rows.dtype), branch


def _begin_backward(
    dy: Tensor, order: Tensor, position: Tensor, branch: Tensor | None, ada_gate: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the rows [R, D], and where `wanted` of their sum [N, D]; the operation's own results dadd and dada,
    empty without `ada_gate`: an operation may not return what it was given."""
    if ada_gate is None:
        none = dy.new_empty(0)
        return torch.ops.dsmoe.gather_rows(dy, order, position), dy, none, none.clone()
    rows, _, dsum, dada = torch.ops.dsmoe.sum_rows_backward(
        dy, position, DTYPE_CODES[dy.dtype], None, None, branch, ada_gate, wanted
    )
    return rows, dsum, dsum, dada


def _bias_gradients(dy: Tensor, gates: Tensor, indices: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """What the second bias adds to the gradient of the gates [N, k], and its own gradient [E, D], float32."""
    wide = dy.float()
    return (wide @ b2.float().mT).gather(1, indices), _spread_gates(gates, indices, b2.shape[0]).mT @ wide


# ---- CPU: one expert after the other


def _forward_by_expert(
    x, gates, indices, order, position, counts, ends, w1, w2, w3, add, residual, ada_gate,
    kind: int, keep: bool, keep_branch: bool,
):  # fmt: skip
    swiglu, sizes = kind == _SWIGLU, counts.tolist()
    rows = torch.ops.dsmoe.gather_rows(x, order, position)
    row_gates = _row_gates(gates, order)
    h = x.new_empty((rows.shape[0], w1.shape[1]) if keep else (0,))
    up = torch.empty_like(h) if swiglu else x.new_empty(0)
    b1, b2 = (None, None) if swiglu else _biases(w1, w3)
    begin = 0
    for e, size in enumerate(sizes):
        if size == 0:
            continue
        own = slice(begin, begin + size)
        begin += size
        mine = rows[own]
        hidden = h[own] if keep else x.new_empty(size, w1.shape[1])
        upper = None
        if swiglu:
            upper = up[own] if keep else torch.empty_like(hidden)
            products.mm(mine, w1[e].mT, hidden)
            products.mm(mine, w3[e].mT, upper)
        else:
            products.addmm(b1[e], mine, w1[e].mT, hidden)
        a = torch.ops.dsmoe.expert_act(hidden, kind, upper, None, None, row_gates[own])
        products.mm(a, w2[e].mT, mine)  # over the expert's own rows, which are not needed again
    second = None if swiglu else (_spread_gates(gates, indices, w1.shape[0]), b2)
    y, branch = _finish(rows, position, add, residual, ada_gate, second, keep_branch)
    return y, h, up, branch


def _backward_by_expert(
    dy, x, gates, indices, order, position, counts, ends, w1, w2, w3, h, up, branch, ada_gate,
    kind: int, weights: bool, added: bool,
):  # fmt: skip
    swiglu, sizes = kind == _SWIGLU, counts.tolist()
    # `rows` becomes the gradient of the expert rows.
    rows, dy, *beside = _begin_backward(dy, order, position, branch, ada_gate, added or not swiglu)
    token, row_gates = order // position.shape[1], _row_gates(gates, order)
    dgate = torch.empty_like(row_gates)
    dweights = [torch.empty_like(w) if weights else x.new_empty(0) for w in (w1, w2, w3)]
    begin = 0
    for e, size in enumerate(sizes):
        mine = slice(begin, begin + size)
        begin += size
        dw = [d[e] for d in dweights] if weights else None
        if size == 0:
            for d in dw or ():
                d.zero_()
            continue
        tokens = x.index_select(0, token[mine])
        if h is None:
            hidden, upper = _first_products(tokens, w1[e], w3[e], swiglu)
        else:
            hidden, upper = h[mine], up[mine] if swiglu else None
        da = torch.empty_like(hidden)
        products.mm(rows[mine], w2[e], da)
        dh, dup, _, dgate[mine], a = torch.ops.dsmoe.expert_act_backward(
            da, hidden, kind, upper, None, None, row_gates[mine], weights
        )
        if weights:
            products.mm(rows[mine].mT, a, dw[1])
            products.mm(dh.mT, tokens, dw[0])
            if swiglu:
                products.mm(dup.mT, tokens, dw[2])
            else:
                dw[2][0, : dh.shape[1]] = dh.sum(0)
        products.mm(dh, w1[e], rows[mine])
        if swiglu:
            products.addmm(rows[mine], dup, w3[e], rows[mine])
        del tokens, hidden, upper, da, dh, dup, a  # before the next expert's are made
    dgates = dgate.index_select(0, position.reshape(-1)).view(position.shape)
    if not swiglu:
        more, db2 = _bias_gradients(dy, gates, indices, _biases(w1, w3)[1])
        dgates += more
        if weights:
            dweights[2][:, 0, w1.shape[1] :] = db2
    dx = torch.ops.dsmoe.sum_rows(rows, position, None, None, None, None, False, False)[0]
    return dx, dgates, *dweights, *beside


def _first_products(tokens: Tensor, w1: Tensor, w3: Tensor, swiglu: bool) -> tuple[Tensor, Tensor | None]:
    """h and up of one expert, once more; h with its bias for GELU."""
    hidden = tokens.new_empty(tokens.shape[0], w1.shape[0])
    if not swiglu:
        products.addmm(w3[0, : w1.shape[0]], tokens, w1.mT, hidden)
        return hidden, None
    upper = torch.empty_like(hidden)
    products.mm(tokens, w1.mT, hidden)
    products.mm(tokens, w3.mT, upper)
    return hidden, upper


# ---- GPU: all experts in one grouped product


def _forward_grouped(
    x, gates, indices, order, position, counts, ends, w1, w2, w3, add, residual, ada_gate,
    kind: int, keep: bool, keep_branch: bool,
):  # fmt: skip
    rows = torch.ops.dsmoe.gather_rows(x, order, position)
    h = rows_times_matrices(rows, w1.mT, counts)
    if kind == _SWIGLU:
        up, b1, second = rows_times_matrices(rows, w3.mT, counts), None, None
    else:
        (b1, b2), up = _biases(w1, w3), None
        second = (_spread_gates(gates, indices, w1.shape[0]), b2)
    a = torch.ops.dsmoe.expert_act(h, kind, up, b1, ends, _row_gates(gates, order))
    rows = rows_times_matrices(a, w2.mT, counts)
    y, branch = _finish(rows, position, add, residual, ada_gate, second, keep_branch)
    none = x.new_empty(0)
    return (y, h, none if up is None else up, branch) if keep else (y, none, none.clone(), branch)


def _backward_grouped(
    dy, x, gates, indices, order, position, counts, ends, w1, w2, w3, h, up, branch, ada_gate,
    kind: int, weights: bool, added: bool,
):  # fmt: skip
    swiglu = kind == _SWIGLU
    b1, b2 = (None, None) if swiglu else _biases(w1, w3)
    dyr, dy, *beside = _begin_backward(dy, order, position, branch, ada_gate, added or not swiglu)
    tokens = torch.ops.dsmoe.gather_rows(x, order, position) if weights or h is None else None
    if h is None:
        h = rows_times_matrices(tokens, w1.mT, counts)
        up = rows_times_matrices(tokens, w3.mT, counts) if swiglu else None
    da = rows_times_matrices(dyr, w2, counts)
    dh, dup, db1, dgate, a = torch.ops.dsmoe.expert_act_backward(
        da, h, kind, up, b1, ends, _row_gates(gates, order), weights
    )
    del da
    dw1 = dw2 = dw3 = x.new_empty(0)
    if weights:
        dw2, dw1 = outer_products(dyr, a, counts), outer_products(dh, tokens, counts)
        dw3 = outer_products(dup, tokens, counts) if swiglu else torch.empty_like(w3)
    else:
        dw2, dw3 = x.new_empty(0), x.new_empty(0)
    del a, dyr, tokens
    dx, dgates = _back_to_tokens(dh, dup if swiglu else None, dgate, position, counts, w1, w3)
    if not swiglu:
        more, db2 = _bias_gradients(dy, gates, indices, b2)
        dgates += more
        if weights:
            dw3[:, 0] = torch.cat([db1.float(), db2], dim=1)
    return dx, dgates, dw1, dw2, dw3, *beside


def _back_to_tokens(dh, dup, dgate, position, counts, w1, w3) -> tuple[Tensor, Tensor]:
    """dx [N, D] and dgates [N, k] from the gradients of rows."""
    drows = rows_times_matrices(dh, w1, counts)
    if dup is not None:
        drows += rows_times_matrices(dup, w3, counts)
    dx = torch.ops.dsmoe.sum_rows(drows, position, None, None, None, None, False, False)[0]
    return dx, dgate.index_select(0, position.reshape(-1)).view(position.shape)


# ---- SwiGLU in the products


def _forward_glu(
    x, gates, indices, order, position, counts, ends, w1, w2, w3, add, residual, ada_gate,
    keep: bool, keep_branch: bool,
):  # fmt: skip
    a, h, up = grouped_glu(x, order, position.shape[1], w1, w3, ends, _row_gates(gates, order), keep)
    rows = rows_times_matrices(a, w2.mT, counts)
    y, branch = _finish(rows, position, add, residual, ada_gate, None, keep_branch)
    return y, h, up, branch


def _backward_glu(
    dy, x, gates, indices, order, position, counts, ends, w1, w2, w3, h, up, branch, ada_gate,
    weights: bool, added: bool,
):  # fmt: skip
    row_gates, k, a = _row_gates(gates, order), position.shape[1], None
    if h is None:
        a, h, up = grouped_glu(x, order, k, w1, w3, ends, row_gates, True)
    again = weights and a is None
    if not weights and ada_gate is None:
        dh, dup, _, dgate = grouped_dglu(dy, order, k, w2, ends, h, up, row_gates, False)
        none = (x.new_empty(0) for _ in range(5))
        return *_back_to_tokens(dh, dup, dgate, position, counts, w1, w3), *none
    # Rows of dy are needed for dw2 too, or come gated; so the product need not gather once more.
    dyr, _, *beside = _begin_backward(dy, order, position, branch, ada_gate, added)
    dh, dup, made, dgate = grouped_dglu(dyr, None, 1, w2, ends, h, up, row_gates, again)
    back = _back_to_tokens(dh, dup, dgate, position, counts, w1, w3)
    if not weights:
        return *back, *(x.new_empty(0) for _ in range(3)), *beside
    dw2 = outer_products(dyr, made if again else a, counts)
    del a, made, dyr
    tokens = torch.ops.dsmoe.gather_rows(x, order, position)
    dw1, dw3 = outer_products(dh, tokens, counts), outer_products(dup, tokens, counts)
    return *back, dw1, dw2, dw3, *beside
