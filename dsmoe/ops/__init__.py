"""The face of every fused operation.

Shapes: B batch, T tokens, D dim, N tokens flattened, E experts, k choices, R = N*k rows in expert order (all
rows of expert 0 first).

Each op runs the best implementation for the device of its first argument (`implementations()` lists them), or the
one that `prefer()` names; `dsmoe.ops.random` is apart, because random integers must be the same everywhere.
"""

from collections.abc import Mapping

from torch import Tensor

from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.ops import megatron
from dsmoe.ops.dispatch import Implementation, Op, set_preferred, use
from dsmoe.ops.reference import activation, grouped, modulation, routing, rows
from dsmoe.ops.reference.routing import Routing

__all__ = [
    "Routing",
    "add_expert_bias",
    "check_preferences",
    "expert_act",
    "gather_rows",
    "grouped_mm",
    "implementations",
    "modulate",
    "prefer",
    "route",
    "sum_rows",
    "use",
]

# After the reference: on no machine the default. What serves where nothing is preferred stands first.
_OTHERS = {
    function.__name__: (Implementation("megatron", function, megatron.DEVICES, megatron.installed, megatron.load),)
    for function in (megatron.gather_rows, megatron.sum_rows)
}
_OPS = {
    function.__name__: Op(
        function.__name__, (Implementation("reference", function), *_OTHERS.get(function.__name__, ()))
    )
    for function in (
        routing.route,
        rows.gather_rows,
        rows.sum_rows,
        grouped.grouped_mm,
        activation.expert_act,
        activation.add_expert_bias,
        modulation.modulate,
    )
}


def implementations(device_type: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """(op, implementation in use, all that serve the device) for each op, on "cpu", "cuda", ..."""
    return [(name, op.choose(device_type).name, op.available(device_type)) for name, op in _OPS.items()]


def check_preferences(preferences: Mapping[str, str], device_type: str) -> None:
    """ConfigError with the choices for an unknown op, or an implementation that is not to be had on the device.

    preferences: op -> name of an implementation, as `implementations()` lists them.
    """
    for op, name in preferences.items():
        if op not in _OPS:
            raise ConfigError(choose_from("op", op, _OPS))
        _OPS[op].named(name, device_type).load()


def prefer(preferences: Mapping[str, str], device_type: str) -> None:
    """From now on in this process these implementations come before the default order, on devices that they serve.

    Replaces what was preferred before; {} is the default order. Errors: see check_preferences.
    """
    check_preferences(preferences, device_type)
    set_preferred(preferences)


def route(x: Tensor, weight: Tensor, k: int, renormalize: bool, bias: Tensor | None = None) -> Routing:
    """Top-k softmax routing of tokens x[N,D] by the gate weight[E,D] (DiT-MoE; contracts 2.2).

    Softmax over all experts, then the k largest, in float32 (float64 for float64 input); equal probabilities
    go to the lower expert. Without `renormalize` the gates are the plain probabilities (sum below 1); with it
    they are divided by their sum. Gradients reach probs, gates and logsumexp. E <= 32767.

    bias [E], float32, is added to the probabilities for the choice alone; the gates do not see it (Wang et al. 2024,
    "Auxiliary-loss-free load balancing", eq. 3).
    """
    return _OPS["route"](x, weight, k, renormalize, bias)


def gather_rows(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
    """Tokens x[N,D] copied to rows[R,D]: row r is token order[r] // k. order, position: fields of Routing.

    The gradient is sum_rows: deterministic, added in float32.
    """
    return _OPS["gather_rows"](x, order, position)


def sum_rows(rows: Tensor, order: Tensor, position: Tensor, gates: Tensor | None = None) -> Tensor:
    """Rows[R,D] back to tokens [N,D]: token n is sum_j gates[n,j] * rows[position[n,j]], or the plain sum.

    Computed and returned in float32 (float64 for float64). The gradient is gather_rows.
    """
    return _OPS["sum_rows"](rows, order, position, gates)


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor, *, transposed: bool = False) -> Tensor:
    """x[R,K] times weight[E,K,M] -> [R,M]: the first counts[0] rows by weight[0], the next counts[1] by
    weight[1], ... counts int64 [E] must sum to R. One dtype throughout.

    transposed: weight is [E,M,K], as stored by a linear layer. Prefer it over passing weight.mT: the op then
    saves the parameter itself, which ZeRO-3 can release between forward and backward. An expert without rows
    gets a zero gradient.
    """
    return _OPS["grouped_mm"](x, weight, counts, transposed=transposed)


def expert_act(h: Tensor, kind: str, up: Tensor | None = None) -> Tensor:
    """Activation of expert rows h[R,F]: "swiglu" gives silu(h) * up[R,F], "gelu" the tanh form of GELU."""
    return _OPS["expert_act"](h, kind, up)


def add_expert_bias(rows: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
    """rows[R,M] + bias[e(r)], bias [E,M], with e(r) the expert of row r as given by counts[E].

    The bias gradient is a matrix product: deterministic, accumulated in float32.
    """
    return _OPS["add_expert_bias"](rows, bias, counts)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm of DiT (contracts 2.1.2): LN(x[B,T,D]) * (1 + scale[B,D]) + shift[B,D].

    LN has eps 1e-6 and no affine parameters; all in float32, returned in the dtype of x.
    """
    return _OPS["modulate"](x, shift, scale)
