"""The experts' operation on a CPU: one expert after the other, so that rows stay in the cache and temporaries are those
of one expert."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsmoe.ops import products
from dsmoe.ops.native import ffn_parts as parts
from dsmoe.ops.native.ffn_parts import SWIGLU, End, Kept, Places, Weights


def forward(x: Tensor, to: Places, w: Weights, end: End, kind: int, keep: bool) -> tuple[Tensor, ...]:
    """y [N, D] and what is kept, as ffn.py defines the operation."""
    swiglu, sizes = kind == SWIGLU, to.counts.tolist()
    rows = torch.ops.dsmoe.gather_rows(x, to.order, to.position)
    h = x.new_empty((rows.shape[0], w.w1.shape[1]) if keep else (0,))
    up = torch.empty_like(h) if swiglu else x.new_empty(0)
    b1, b2 = (None, None) if swiglu else w.biases()
    # Views are made for all experts at once: for small layers theirs is a part of the time.
    by_rows = (
        rows.split(sizes),
        to.row_gates().split(sizes),
        _split(h, sizes, keep),
        _split(up, sizes, keep and swiglu),
    )
    stacks = (w.w1.mT.unbind(), w.w2.mT.unbind(), (w.w3.mT if swiglu else b1).unbind())
    for mine, gates, hidden, upper, w1, w2, third in zip(*by_rows, *stacks, strict=True):
        if not len(mine):
            continue
        hidden = x.new_empty(len(mine), w1.shape[1]) if hidden is None else hidden
        if swiglu:
            upper = torch.empty_like(hidden) if upper is None else upper
            products.mm(mine, w1, hidden)
            products.mm(mine, third, upper)
        else:
            products.addmm(third, mine, w1, hidden)
        a = torch.ops.dsmoe.expert_act(hidden, kind, upper, None, None, gates)
        products.mm(a, w2, mine)  # over the expert's own rows, which are not needed again
        del hidden, upper, a
    add, *firsts = (None, None, None) if w.s1 is None else parts.shared_forward(x, w)
    firsts = firsts if keep and w.s1 is not None else parts.no_gradients(x, 2)
    y, branch = parts.finish(rows, to, add, b2, end)
    return y, h, up, *firsts, branch


def backward(
    dy: Tensor, x: Tensor, to: Places, w: Weights, kept: Kept, ada_gate: Tensor | None, kind: int, weights: bool
) -> tuple[Tensor, ...]:
    """Gradients of x, gates, the six weights and ada_gate."""
    swiglu = kind == SWIGLU
    # `rows` becomes the gradient of the expert rows.
    rows, dsum, dada = parts.begin_backward(dy, to, kept.branch, ada_gate, w.s1 is not None or not swiglu)
    dshared, *dw_shared = _shared_backward(dsum, x, w, kept, weights)
    dweights = [torch.empty_like(stack) if weights else x.new_empty(0) for stack in w[:3]]
    dgate = _through_experts(rows, x, to, w, kept, kind, dweights if weights else None)
    dx, dgates = parts.back_to_tokens(rows, dgate, dshared, to)
    if not swiglu:
        more, db2 = parts.bias_gradients(dsum, to, w.biases()[1])
        dgates += more
        if weights:
            dweights[2][:, 0, w.w1.shape[1] :] = db2
    return dx, dgates, *dweights, *dw_shared, dada


def _shared_backward(dsum: Tensor, x: Tensor, w: Weights, kept: Kept, weights: bool) -> tuple[Tensor | None, ...]:
    if w.s1 is None:
        return None, *parts.no_gradients(x, 3)
    return parts.shared_backward(dsum, x, w, kept.shared_h, kept.shared_up, weights)


def _through_experts(
    rows: Tensor, x: Tensor, to: Places, w: Weights, kept: Kept, kind: int, dweights: list[Tensor] | None
) -> Tensor:
    """Turn the gradients of results `rows` [R, D] into those of the experts' inputs, in place; fill dweights if given.
    Returns the gradient of the gates [R], float32."""
    swiglu, sizes = kind == SWIGLU, to.counts.tolist()
    token, row_gates = to.order // to.position.shape[1], to.row_gates()
    by_rows = [t.split(sizes) for t in (rows, token, row_gates)]
    by_rows += [_split(kept.h, sizes, kept.h is not None), _split(kept.up, sizes, kept.up is not None)]
    stacks = [stack.unbind() for stack in w[:3]]
    made = [[None] * len(sizes)] * 3 if dweights is None else [d.unbind() for d in dweights]
    dgate = []
    for mine, own, gates, hidden, upper, w1, w2, w3, *dw in zip(*by_rows, *stacks, *made, strict=True):
        if not len(mine):
            for d in dw if dweights is not None else ():
                d.zero_()
            continue
        if hidden is None:
            hidden, upper = _first_products(x.index_select(0, own), w1, w3, swiglu)
        da = torch.empty_like(hidden)
        products.mm(mine, w2, da)
        dh, dup, _, found, a = torch.ops.dsmoe.expert_act_backward(
            da, hidden, kind, upper, None, None, gates, dweights is not None
        )
        dgate.append(found)
        # Each is freed after its last use: what is alive at once decides the layer's peak.
        del da, hidden, upper
        if dweights is not None:
            products.mm(mine.mT, a, dw[1])
        del a
        if dweights is not None:
            tokens = x.index_select(0, own)
            products.mm(dh.mT, tokens, dw[0])
            if not swiglu:
                dw[2][0, : dh.shape[1]] = dh.sum(0)
        products.mm(dh, w1, mine)
        del dh
        if swiglu:
            products.addmm(mine, dup, w3, mine)
            if dweights is not None:
                products.mm(dup.mT, tokens, dw[2])
        tokens = dup = None
    return torch.cat(dgate) if dgate else torch.empty_like(row_gates)


def _split(rows: Tensor | None, sizes: list[int], there: bool) -> Sequence[Tensor | None]:
    """Each expert's rows, or a None for each."""
    return rows.split(sizes) if there else (None,) * len(sizes)


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
