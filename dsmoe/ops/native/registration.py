"""What torch must know of the compiled operations beside their code: result shapes (fakes) and gradients.

Every backward is an operation of its own; differentiating it once more is refused.
"""

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # kernels/csrc/cuda/launchers.h


def register() -> None:
    """Fakes and gradients of all of them; called once, after the library is loaded."""
    fakes = {
        "route": _fake_route,
        "route_backward": lambda probs, *_: torch.empty_like(probs),
        "gather_rows": lambda x, order, position: x.new_empty(order.shape[0], x.shape[1]),
        "sum_rows": _fake_sum_rows,
        "sum_rows_backward": _fake_sum_rows_backward,
        "expert_act": lambda h, *_: h.new_empty(h.shape),
        "expert_act_backward": _fake_expert_act_backward,
        "modulate": _fake_modulate,
        "modulate_backward": _fake_modulate_backward,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"dsmoe::{name}", fake)
    gradients = {
        "route": (_route_backward, _save_route),
        "gather_rows": (_gather_rows_backward, _save_gather_rows),
        "sum_rows": (_sum_rows_backward, _save_sum_rows),
        "expert_act": (_expert_act_backward, _save_expert_act),
        "modulate": (_modulate_backward, _save_modulate),
    }
    for name, (backward, save) in gradients.items():
        torch.library.register_autograd(f"dsmoe::{name}", backward, setup_context=save)
        if name != "gather_rows":
            refuse_gradient(f"dsmoe::{name}_backward")


def refuse_gradient(name: str) -> None:
    """Differentiating this operation is an error that says so."""

    def backward(ctx, *_):
        raise RuntimeError(f"{name} has no gradient: dsmoe's operations can be differentiated once.")

    torch.library.register_autograd(name, backward)


# ---- route


def _fake_route(x: Tensor, weight: Tensor, k: int, renormalize: bool, bias: Tensor | None):
    tokens, experts = x.shape[0], weight.shape[0]
    real = {"dtype": torch.float32}
    whole = {"dtype": torch.int64}
    return (
        x.new_empty(tokens, experts, **real),
        x.new_empty(tokens, k, **real),
        x.new_empty(tokens, k, **whole),
        x.new_empty(experts, **whole),
        x.new_empty(experts, dtype=torch.int32),
        x.new_empty(tokens * k, **whole),
        x.new_empty(tokens, k, **whole),
        x.new_empty(tokens, **real),
        x.new_empty(experts, **real),
    )


def _save_route(ctx, inputs, output):
    x, weight, _, ctx.renormalize, _ = inputs
    probs, gates, indices, *_ = output
    ctx.save_for_backward(x, weight, probs, gates, indices)
    ctx.set_materialize_grads(False)


def _route_backward(ctx, dprobs, dgates, _i, _c, _e, _o, _p, dlogsumexp, dprob_sum):
    x, weight, probs, gates, indices = ctx.saved_tensors
    given = (dprobs, dgates, dlogsumexp, dprob_sum)
    if all(gradient is None for gradient in given):
        return None, None, None, None, None
    dlogits = torch.ops.dsmoe.route_backward(probs, gates, indices, ctx.renormalize, *given)
    dx = (dlogits @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
    dweight = (dlogits.mT @ x.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
    return dx, dweight, None, None, None


# ---- rows


def _save_gather_rows(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _gather_rows_backward(ctx, grad):
    (position,) = ctx.saved_tensors
    return torch.ops.dsmoe.sum_rows(grad, position, None, None, None, None, False, False)[0], None, None


def _fake_sum_rows(rows, position, gates, add, residual, ada_gate, wide: bool, keep_branch: bool):
    shape = (position.shape[0], rows.shape[1])
    out = rows.new_empty(shape, dtype=torch.float32 if wide else rows.dtype)
    return out, rows.new_empty(shape if keep_branch else (0,))


def _save_sum_rows(ctx, inputs, output):
    rows, position, gates, add, residual, ada_gate, _, keep_branch = inputs
    ctx.save_for_backward(
        position, None if gates is None else rows, gates, output[1] if keep_branch else None, ada_gate
    )
    ctx.dtype, ctx.add, ctx.residual = rows.dtype, add is not None, residual is not None
    ctx.set_materialize_grads(False)


def _sum_rows_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 8
    position, rows, gates, branch, ada_gate = ctx.saved_tensors
    narrow = ctx.dtype == grad.dtype
    want_dbranch = ctx.add and (ada_gate is not None or not narrow)
    drows, dgates, dbranch, dada = torch.ops.dsmoe.sum_rows_backward(
        grad, position, DTYPE_CODES[ctx.dtype], rows, gates, branch, ada_gate, want_dbranch
    )
    dadd = (dbranch if want_dbranch else grad) if ctx.add else None
    dresidual = grad.to(ctx.dtype) if ctx.residual else None
    return drows, None, dgates if gates is not None else None, dadd, dresidual, _if(branch, dada), None, None


def _fake_sum_rows_backward(dout, position, dtype: int, rows, gates, branch, ada_gate, want_dbranch: bool):
    (narrow,) = (t for t, code in DTYPE_CODES.items() if code == dtype)
    tokens, dim = dout.shape
    return (
        dout.new_empty(position.numel(), dim, dtype=narrow),
        dout.new_empty((0,) if gates is None else position.shape, dtype=torch.float32),
        dout.new_empty((tokens, dim) if want_dbranch else (0,), dtype=narrow),
        dout.new_empty((0,) if branch is None else (1 if ada_gate is None else ada_gate.shape[0], dim), dtype=narrow),
    )


def _if(condition: object, value: Tensor) -> Tensor | None:
    return None if condition is None else value


# ---- activation


def _save_expert_act(ctx, inputs, output):
    h, ctx.kind, up, bias, ends, gate = inputs
    ctx.save_for_backward(h, up, bias, ends, gate)


def _expert_act_backward(ctx, grad):
    h, up, bias, ends, gate = ctx.saved_tensors
    dh, dup, dbias, dgate, _ = torch.ops.dsmoe.expert_act_backward(grad, h, ctx.kind, up, bias, ends, gate, False)
    return dh, None, _if(up, dup), _if(bias, dbias), None, _if(gate, dgate)


def _fake_expert_act_backward(da, h, kind: int, up, bias, ends, gate, again: bool):
    return (
        h.new_empty(h.shape),
        h.new_empty((0,) if up is None else h.shape),
        h.new_empty((0,) if bias is None else bias.shape),
        h.new_empty((0,) if gate is None else h.shape[:1], dtype=torch.float32),
        h.new_empty(h.shape if again else (0,)),
    )


# ---- modulation


def _fake_modulate(x, shift, scale):
    statistics = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


def _save_modulate(ctx, inputs, output):
    x, _, scale = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.set_materialize_grads(False)


def _modulate_backward(ctx, grad, _mean, _rstd):
    if grad is None:
        return None, None, None
    return torch.ops.dsmoe.modulate_backward(grad, *ctx.saved_tensors)


def _fake_modulate_backward(dy, x, scale, mean, rstd):
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)
