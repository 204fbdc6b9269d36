"""The experts from tokens to tokens as one operation and its backward, built on the compiled pieces.

The gate is folded into the activation (a_r = gate_r act(h_r)), so that the way back is a plain sum of rows, the
second product's result is not kept, and the gate's gradient falls out of the activation's backward. Kept for the
backward are the tokens, h and up, of the shared expert too; with `recompute` the tokens alone. Beside them, with
`ada_gate`, the sum that it multiplies, in the dtype of the tokens: what a gate of its own would keep. The products go
by a `variant`, which is an argument of the operation:

- "library": on a CPU the experts go one after the other (ffn_by_expert.py); on a GPU all go through the library's
  grouped product, the shared expert beside them on a stream of its own (ffn_grouped.py).
- "blocks": kernels of our own, on a CPU; measured faster than the library's where the model is narrow (ffn_blocks.py).
- "glu": first product, SwiGLU and gate in one kernel, and the backward of the second with that of SwiGLU, the shared
  expert's in the same launches (ffn_grouped.py, glu.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsmoe.ops.native import ffn_blocks, ffn_by_expert, ffn_grouped
from dsmoe.ops.native.ffn_parts import SWIGLU, End, Kept, Places, Weights
from dsmoe.ops.native.registration import refuse_gradient
from dsmoe.ops.reference.ffn import Matrices
from dsmoe.ops.reference.routing import Routing

LIBRARY, BLOCKS, GLU = "library", "blocks", "glu"
_PLACES = "Tensor x, Tensor gates, Tensor indices, Tensor order, Tensor position, Tensor counts, Tensor ends"
_WEIGHTS = "Tensor w1, Tensor w2, Tensor w3, Tensor? s1, Tensor? s2, Tensor? s3"
_KEPT = "Tensor? h, Tensor? up, Tensor? shared_h, Tensor? shared_up, Tensor? branch"
# Arguments of each group; the tokens stand before the places, and the backward's dy before them.
_N_PLACES, _N_WEIGHTS, _N_END, _N_KEPT = (len(group._fields) for group in (Places, Weights, End, Kept))


def declare() -> None:
    """Define dsmoe::moe_ffn and its backward; called once, after the compiled pieces are registered."""
    ffn_blocks.declare()
    define, implement = torch.library.define, torch.library.impl
    define(
        "dsmoe::moe_ffn",
        f"({_PLACES}, {_WEIGHTS}, Tensor? residual, Tensor? ada_gate, bool keep_branch, int kind, "
        "str variant, bool keep) -> (Tensor y, Tensor h, Tensor up, Tensor shared_h, Tensor shared_up, Tensor branch)",
    )
    define(
        "dsmoe::moe_ffn_backward",
        f"(Tensor dy, {_PLACES}, {_WEIGHTS}, {_KEPT}, Tensor? ada_gate, int kind, str variant, bool weights) -> "
        "(Tensor dx, Tensor dgates, Tensor dw1, Tensor dw2, Tensor dw3, Tensor ds1, Tensor ds2, Tensor ds3, "
        "Tensor dada)",
    )
    for device, library in (("CPU", ffn_by_expert), ("CUDA", ffn_grouped)):
        implement("dsmoe::moe_ffn", device, _forward(library.forward))
        implement("dsmoe::moe_ffn_backward", device, _backward(library.backward))
    torch.library.register_fake("dsmoe::moe_ffn", _fake)
    torch.library.register_fake("dsmoe::moe_ffn_backward", _fake_backward)
    torch.library.register_autograd("dsmoe::moe_ffn", _gradient, setup_context=_save)
    refuse_gradient("dsmoe::moe_ffn_backward")


def call(
    x: Tensor,
    to: Routing,
    weights: Matrices,
    shared: Matrices | None,
    kind: int,
    residual: Tensor | None,
    ada_gate: Tensor | None,
    recompute: bool,
    variant: str,
) -> Tensor:
    """x[N,D] -> y[N,D]; see dsmoe.ops.moe_ffn. kind: 0 swiglu, 1 gelu. variant: of the products."""
    keep = torch.is_grad_enabled() and not recompute
    places = (to.gates, to.indices, to.order, to.position, to.counts, to.ends)
    keep_branch = ada_gate is not None and ada_gate.requires_grad and torch.is_grad_enabled()
    w, end = Weights(*weights, *(shared or ())), End(residual, ada_gate, keep_branch)
    return torch.ops.dsmoe.moe_ffn(x, *places, *w, *end, kind, variant, keep)[0]


# ---- the operation's flat arguments, in groups; the implementation by variant


def _forward(library: Callable) -> Callable:
    def run(x, *flat):
        to, w, rest = _groups(flat)
        end, (kind, variant, keep) = End(*rest[:_N_END]), rest[_N_END:]
        _check(variant, kind, x.device.type)
        if variant == BLOCKS:
            return ffn_blocks.forward(x, to, w, end, keep)
        if variant == GLU:
            return ffn_grouped.forward_glu(x, to, w, end, keep)
        return library(x, to, w, end, kind, keep)

    return run


def _backward(library: Callable) -> Callable:
    def run(dy, x, *flat):
        to, w, rest = _groups(flat)
        kept, (ada_gate, kind, variant, weights) = Kept(*rest[:_N_KEPT]), rest[_N_KEPT:]
        if variant == BLOCKS:
            return ffn_blocks.backward(dy, x, to, w, kept, ada_gate, weights)
        if variant == GLU:
            return ffn_grouped.backward_glu(dy, x, to, w, kept, ada_gate, weights)
        return library(dy, x, to, w, kept, ada_gate, kind, weights)

    return run


def _groups(flat: tuple) -> tuple[Places, Weights, tuple]:
    weights_end = _N_PLACES + _N_WEIGHTS
    return Places(*flat[:_N_PLACES]), Weights(*flat[_N_PLACES:weights_end]), flat[weights_end:]


def _check(variant: str, kind: int, device_type: str) -> None:
    of_swiglu = (GLU, BLOCKS) if device_type == "cpu" else (GLU,)
    if variant != LIBRARY and (kind != SWIGLU or variant not in of_swiglu):
        served = f'"{LIBRARY}" serves all experts, "{GLU}" those of swiglu, "{BLOCKS}" those of swiglu on a CPU'
        raise ValueError(f"moe_ffn: variant {variant!r} on {device_type}; {served}.")


# ---- autograd and fakes


def _save(ctx, inputs, output):
    x, *flat = inputs
    to, w, (residual, ada_gate, ctx.keep_branch, ctx.kind, ctx.variant, keep) = _groups(flat)
    _, h, up, shared_h, shared_up, branch = output
    kept = Kept(
        h if keep else None,
        up if keep and ctx.kind == SWIGLU else None,
        shared_h if keep and w.s1 is not None else None,
        shared_up if keep and w.s1 is not None else None,
        branch if ctx.keep_branch else None,
    )
    ctx.save_for_backward(x, *to, *w, *kept, ada_gate)
    ctx.residual = residual is not None
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy, *_):
    given = 1 + _N_PLACES + _N_WEIGHTS
    if dy is None:
        return (None,) * (given + 6)
    weights = any(ctx.needs_input_grad[1 + _N_PLACES : given])
    saved = ctx.saved_tensors  # read once: under checkpoint a second look is refused
    dx, dgates, *made = torch.ops.dsmoe.moe_ffn_backward(dy.contiguous(), *saved, ctx.kind, ctx.variant, weights)
    dada, shared = made.pop(), Weights(*saved[1 + _N_PLACES : given]).s1 is not None
    dweights = [d if weights and (shared or i < 3) else None for i, d in enumerate(made)]
    dresidual, dada = dy if ctx.residual else None, dada if ctx.keep_branch else None
    return dx, dgates, *(None,) * (_N_PLACES - 1), *dweights, dresidual, dada, None, None, None, None


def _fake(x, *flat):
    to, w, (_, _, keep_branch, kind, _, keep) = _groups(flat)
    hidden = (to.order.shape[0], w.w1.shape[1]) if keep else (0,)
    beside = (x.shape[0], w.s1.shape[0]) if keep and w.s1 is not None else (0,)
    kept = (hidden, hidden if kind == SWIGLU else (0,), beside, beside, x.shape if keep_branch else (0,))
    return x.new_empty(x.shape), *(x.new_empty(shape) for shape in kept)


def _fake_backward(dy, x, *flat):
    to, w, rest = _groups(flat)
    branch, ada_gate, weights = rest[_N_KEPT - 1], rest[_N_KEPT], rest[-1]
    made = [x.new_empty(m.shape if weights and m is not None else (0,)) for m in w]
    dada = x.new_empty((0,) if branch is None else ada_gate.shape)
    return x.new_empty(x.shape), to.gates.new_empty(to.gates.shape), *made, dada
