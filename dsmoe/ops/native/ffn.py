"""The routed experts from tokens to tokens as one operation and its backward, built on the compiled pieces.

The gate is folded into the activation (a_r = gate_r act(h_r)), so that the way back is a plain sum of rows, the second
product's result is not kept, and the gate's gradient falls out of the activation's backward. Kept for the backward
are the tokens, h and up; with `recompute` the tokens alone. The products go by a `variant`, which is an argument of the
operation:

- "library": on a CPU the experts go one after the other, so that rows stay in the cache and temporaries are those of
  one expert; on a GPU all go through the library's grouped product.
- "glu": first product, SwiGLU and gate in one kernel, and the backward of the second with that of SwiGLU (glu.py).
"""

import torch
from torch import Tensor

from dsmoe.ops.native.glu import grouped_dglu, grouped_glu
from dsmoe.ops.native.registration import refuse_gradient
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
        f"({_PLACES}, {_WEIGHTS}, Tensor? add, int kind, str variant, bool keep) -> (Tensor y, Tensor h, Tensor up)",
    )
    define(
        "dsmoe::moe_ffn_backward",
        f"(Tensor dy, {_PLACES}, {_WEIGHTS}, Tensor? h, Tensor? up, int kind, str variant, bool weights) "
        "-> (Tensor dx, Tensor dgates, Tensor dw1, Tensor dw2, Tensor dw3)",
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
    x: Tensor, to: Routing, w1: Tensor, w2: Tensor, w3: Tensor, kind: int, add: Tensor | None, recompute: bool
) -> Tensor:
    """x[N,D] -> y[N,D]; see dsmoe.ops.moe_ffn. kind: 0 swiglu, 1 gelu."""
    keep = torch.is_grad_enabled() and not recompute
    places = (to.gates, to.indices, to.order, to.position, to.counts, to.ends)
    return torch.ops.dsmoe.moe_ffn(x, *places, w1, w2, w3, add, kind, _variant(x, w1, kind), keep)[0]


def _variant(x: Tensor, w1: Tensor, kind: int) -> str:
    """The variant for these tokens and experts: the library's, since "glu" was never measured."""
    return LIBRARY


def _by_variant(library, glu):
    """An implementation that takes (..., kind, variant, flag)."""

    def run(*arguments):
        *given, kind, variant, flag = arguments
        if variant == GLU and kind == _SWIGLU:
            return glu(*given, flag)
        if variant != LIBRARY:
            raise ValueError(f'moe_ffn: variant {variant!r}; "{LIBRARY}" serves all experts, "{GLU}" those of swiglu.')
        return library(*given, kind, flag)

    return run


# ---- autograd and fakes


def _save(ctx, inputs, output):
    x, *places, w1, w2, w3, add, ctx.kind, ctx.variant, ctx.keep = inputs
    _, h, up = output
    kept = (h, up if ctx.kind == _SWIGLU else None) if ctx.keep else (None, None)
    ctx.save_for_backward(x, *places, w1, w2, w3, *kept)
    ctx.add = add is not None
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy, _h, _up):
    if dy is None:
        return (None,) * 14
    weights = any(ctx.needs_input_grad[7:10])
    dx, dgates, *dweights = torch.ops.dsmoe.moe_ffn_backward(
        dy.contiguous(), *ctx.saved_tensors, ctx.kind, ctx.variant, weights
    )
    dweights = dweights if weights else (None, None, None)
    return dx, dgates, None, None, None, None, None, *dweights, dy if ctx.add else None, None, None, None


def _fake(x, gates, indices, order, position, counts, ends, w1, w2, w3, add, kind: int, variant: str, keep: bool):
    hidden = (order.shape[0], w1.shape[1]) if keep else (0,)
    return x.new_empty(x.shape), x.new_empty(hidden), x.new_empty(hidden if kind == _SWIGLU else (0,))


def _fake_backward(
    dy, x, gates, indices, order, position, counts, ends, w1, w2, w3, h, up, kind: int, variant: str, weights: bool
):  # fmt: skip
    given = (w1, w2, w3) if weights else ()
    made = [w.new_empty(w.shape) for w in given] or [x.new_empty(0) for _ in range(3)]
    return x.new_empty(x.shape), gates.new_empty(gates.shape), *made


# ---- pieces


def _row_gates(gates: Tensor, order: Tensor) -> Tensor:
    return gates.reshape(-1).index_select(0, order)


def _biases(w1: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
    """b1 [E, F] and b2 [E, D] of GELU experts."""
    return w3[:, 0].split((w1.shape[1], w1.shape[2]), dim=-1)


def _spread_gates(gates: Tensor, indices: Tensor, experts: int) -> Tensor:
    """Gates [N, k] as a matrix [N, E], zero for experts that were not chosen."""
    return gates.new_zeros(gates.shape[0], experts).scatter_(1, indices, gates)


def _finish(rows: Tensor, position: Tensor, add: Tensor | None, second: tuple[Tensor, Tensor] | None) -> Tensor:
    """Sum of a token's rows, `add`, and gates [N, E] times second biases [E, D]; in float32, rounded once."""
    if second is None:
        return torch.ops.dsmoe.sum_rows(rows, position, None, add, None, None, False, False)[0]
    total = torch.ops.dsmoe.sum_rows(rows, position, None, add, None, None, True, False)[0]
    return total.addmm_(second[0], second[1].float()).to(rows.dtype)


def _bias_gradients(dy: Tensor, gates: Tensor, indices: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """What the second bias adds to the gradient of the gates [N, k], and its own gradient [E, D], float32."""
    wide = dy.float()
    return (wide @ b2.float().mT).gather(1, indices), _spread_gates(gates, indices, b2.shape[0]).mT @ wide


# ---- CPU: one expert after the other


def _forward_by_expert(x, gates, indices, order, position, counts, ends, w1, w2, w3, add, kind: int, keep: bool):
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
            torch.mm(mine, w1[e].mT, out=hidden)
            torch.mm(mine, w3[e].mT, out=upper)
        else:
            torch.addmm(b1[e], mine, w1[e].mT, out=hidden)
        a = torch.ops.dsmoe.expert_act(hidden, kind, upper, None, None, row_gates[own])
        torch.mm(a, w2[e].mT, out=mine)  # over the expert's own rows, which are not needed again
    second = None if swiglu else (_spread_gates(gates, indices, w1.shape[0]), b2)
    return _finish(rows, position, add, second), h, up


def _backward_by_expert(
    dy, x, gates, indices, order, position, counts, ends, w1, w2, w3, h, up, kind: int, weights: bool
):  # fmt: skip
    swiglu, sizes = kind == _SWIGLU, counts.tolist()
    rows = torch.ops.dsmoe.gather_rows(dy, order, position)  # becomes the gradient of the expert rows
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
        da = torch.mm(rows[mine], w2[e])
        dh, dup, _, dgate[mine], a = torch.ops.dsmoe.expert_act_backward(
            da, hidden, kind, upper, None, None, row_gates[mine], weights
        )
        if weights:
            torch.mm(rows[mine].mT, a, out=dw[1])
            torch.mm(dh.mT, tokens, out=dw[0])
            if swiglu:
                torch.mm(dup.mT, tokens, out=dw[2])
            else:
                dw[2][0, : dh.shape[1]] = dh.sum(0)
        torch.mm(dh, w1[e], out=rows[mine])
        if swiglu:
            rows[mine].addmm_(dup, w3[e])
    dgates = dgate.index_select(0, position.reshape(-1)).view(position.shape)
    if not swiglu:
        beside, db2 = _bias_gradients(dy, gates, indices, _biases(w1, w3)[1])
        dgates += beside
        if weights:
            dweights[2][:, 0, w1.shape[1] :] = db2
    return torch.ops.dsmoe.sum_rows(rows, position, None, None, None, None, False, False)[0], dgates, *dweights


def _first_products(tokens: Tensor, w1: Tensor, w3: Tensor, swiglu: bool) -> tuple[Tensor, Tensor | None]:
    """h and up of one expert, once more; h with its bias for GELU."""
    if swiglu:
        return torch.mm(tokens, w1.mT), torch.mm(tokens, w3.mT)
    return torch.addmm(w3[0, : w1.shape[0]], tokens, w1.mT), None


# ---- GPU: all experts in one grouped product


def _forward_grouped(x, gates, indices, order, position, counts, ends, w1, w2, w3, add, kind: int, keep: bool):
    rows = torch.ops.dsmoe.gather_rows(x, order, position)
    h = rows_times_matrices(rows, w1.mT, counts)
    if kind == _SWIGLU:
        up, b1, second = rows_times_matrices(rows, w3.mT, counts), None, None
    else:
        (b1, b2), up = _biases(w1, w3), None
        second = (_spread_gates(gates, indices, w1.shape[0]), b2)
    a = torch.ops.dsmoe.expert_act(h, kind, up, b1, ends, _row_gates(gates, order))
    y = _finish(rows_times_matrices(a, w2.mT, counts), position, add, second)
    none = x.new_empty(0)
    return (y, h, none if up is None else up) if keep else (y, none, none.clone())


def _backward_grouped(
    dy, x, gates, indices, order, position, counts, ends, w1, w2, w3, h, up, kind: int, weights: bool
):  # fmt: skip
    swiglu = kind == _SWIGLU
    b1, b2 = (None, None) if swiglu else _biases(w1, w3)
    dyr = torch.ops.dsmoe.gather_rows(dy, order, position)
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
        beside, db2 = _bias_gradients(dy, gates, indices, b2)
        dgates += beside
        if weights:
            dw3[:, 0] = torch.cat([db1.float(), db2], dim=1)
    return dx, dgates, dw1, dw2, dw3


def _back_to_tokens(dh, dup, dgate, position, counts, w1, w3) -> tuple[Tensor, Tensor]:
    """dx [N, D] and dgates [N, k] from the gradients of rows."""
    drows = rows_times_matrices(dh, w1, counts)
    if dup is not None:
        drows += rows_times_matrices(dup, w3, counts)
    dx = torch.ops.dsmoe.sum_rows(drows, position, None, None, None, None, False, False)[0]
    return dx, dgate.index_select(0, position.reshape(-1)).view(position.shape)


# ---- SwiGLU in the products


def _forward_glu(x, gates, indices, order, position, counts, ends, w1, w2, w3, add, keep: bool):
    a, h, up = grouped_glu(x, order, position.shape[1], w1, w3, ends, _row_gates(gates, order), keep)
    return _finish(rows_times_matrices(a, w2.mT, counts), position, add, None), h, up


def _backward_glu(dy, x, gates, indices, order, position, counts, ends, w1, w2, w3, h, up, weights: bool):
    row_gates, k, a = _row_gates(gates, order), position.shape[1], None
    if h is None:
        a, h, up = grouped_glu(x, order, k, w1, w3, ends, row_gates, True)
    again = weights and a is None
    if not weights:
        dh, dup, _, dgate = grouped_dglu(dy, order, k, w2, ends, h, up, row_gates, False)
        none = (x.new_empty(0) for _ in range(3))
        return *_back_to_tokens(dh, dup, dgate, position, counts, w1, w3), *none
    dyr = torch.ops.dsmoe.gather_rows(dy, order, position)  # for dw2; so the product need not gather once more
    dh, dup, made, dgate = grouped_dglu(dyr, None, 1, w2, ends, h, up, row_gates, again)
    dw2 = outer_products(dyr, made if again else a, counts)
    del a, made, dyr
    tokens = torch.ops.dsmoe.gather_rows(x, order, position)
    dw1, dw3 = outer_products(dh, tokens, counts), outer_products(dup, tokens, counts)
    del tokens
    return *_back_to_tokens(dh, dup, dgate, position, counts, w1, w3), dw1, dw2, dw3
