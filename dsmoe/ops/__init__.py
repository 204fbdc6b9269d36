"""The face of every fused operation.

Shapes: B batch, T tokens, D dim, N tokens flattened, E experts, k choices, R = N*k rows in expert order (all
rows of expert 0 first).

Each op runs the best implementation for the device of its first argument (`implementations()` lists them): the one that
`prefer()` names, else the one measured fastest for its sizes (dsmoe.ops.tuning), else the first; `dsmoe.ops.random` is
apart, because random integers must be the same everywhere.
"""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.ops import megatron, native, sizes
from dsmoe.ops.dispatch import Implementation, Op, set_preferred, use
from dsmoe.ops.reference import activation, ffn, grouped, modulation, routing, rows
from dsmoe.ops.reference.ffn import Matrices
from dsmoe.ops.reference.routing import Routing

__all__ = [
    "Routing",
    "add_expert_bias",
    "check_preferences",
    "compiled_block",
    "expert_act",
    "expert_rows",
    "gather_rows",
    "grouped_mm",
    "implementations",
    "kernels",
    "modulate",
    "moe_ffn",
    "operation",
    "prefer",
    "route",
    "sum_rows",
    "tunable",
    "use",
]

_REFERENCE = (
    routing.route,
    rows.gather_rows,
    rows.sum_rows,
    grouped.grouped_mm,
    activation.expert_act,
    activation.add_expert_bias,
    modulation.modulate,
    ffn.moe_ffn,
    ffn.expert_rows,
)
# Before the reference, so the default where they serve: measured on a CPU, table in kernels/README.md. A variant,
# which only a preference or a measurement chooses, is an Implementation NAME:VARIANT behind its NAME.
_NATIVE = {
    function.__name__: (Implementation("native", function, native.DEVICES),)
    for function in (
        native.route,
        native.gather_rows,
        native.sum_rows,
        native.expert_act,
        native.modulate,
        native.moe_ffn,
    )
}
_NATIVE["moe_ffn"] += tuple(
    Implementation(f"native:{name}", partial(native.moe_ffn, variant=name), devices)
    for name, devices in native.VARIANTS.items()
)
# After the reference: on no machine the default.
_OTHERS = {
    function.__name__: (Implementation("megatron", function, megatron.DEVICES, megatron.installed, megatron.load),)
    for function in (megatron.gather_rows, megatron.sum_rows)
}


_SIZES = {
    function.__name__: function
    for function in (
        sizes.route,
        sizes.gather_rows,
        sizes.sum_rows,
        sizes.expert_act,
        sizes.modulate,
        sizes.moe_ffn,
    )
}


def _op(name: str, reference: Callable) -> Op:
    every = (*_NATIVE.get(name, ()), Implementation("reference", reference), *_OTHERS.get(name, ()))
    return Op(name, every, _SIZES.get(name))


_OPS = {function.__name__: _op(function.__name__, function) for function in _REFERENCE}


def kernels() -> str:
    """State of the compiled operations in one line: of which sources, for which devices, or why there are none."""
    return native.LIBRARY.describe()


def implementations(device_type: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """(op, implementation in use, all that serve the device) for each op, on "cpu", "cuda", ..."""
    return [(name, op.choose(device_type).name, op.available(device_type)) for name, op in _OPS.items()]


def compiled_block(device_type: str, preferences: Mapping[str, str] | None = None) -> bool:
    """Whether moe_ffn runs as the compiled operation there, which keeps less memory (base.activations).

    preferences: op -> name of an implementation, that would be in force.
    """
    used = (preferences or {}).get("moe_ffn") or _OPS["moe_ffn"].choose(device_type).name
    return used.partition(":")[0] == "native"


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

    Replaces what was preferred before; {} is the default order. Errors: see check_preferences. The native moe_ffn has
    its pieces inside, so preferences for gather_rows and the like reach the experts on one rank only with
    {"moe_ffn": "reference"}.
    """
    check_preferences(preferences, device_type)
    set_preferred(preferences)


def operation(name: str) -> Op:
    """An op by name, with its implementations and the sizes that tuning goes by."""
    return _OPS[name]


def tunable() -> tuple[str, ...]:
    """Ops of which `python -m dsmoe tune` measures the implementations."""
    return tuple(name for name, op in _OPS.items() if op.sizes is not None)


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


def sum_rows(
    rows: Tensor,
    order: Tensor,
    position: Tensor,
    gates: Tensor | None = None,
    *,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
    narrow: bool = False,
) -> Tensor:
    """Rows[R,D] back to tokens [N,D]: token n is sum_j gates[n,j] * rows[position[n,j]], or the plain sum.

    add [N,D] is added to the sum (the shared expert's output); ada_gate [B,D] then multiplies it, token n belonging to
    image n // (N / B), and residual [N,D] is added last: the end of a DiT block in one pass. Computed and returned in
    float32 (float64 for float64); with `narrow` rounded once to the dtype of the rows. The gradient is gather_rows.
    """
    return _OPS["sum_rows"](rows, order, position, gates, add, residual, ada_gate, narrow)


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor, *, transposed: bool = False) -> Tensor:
    """x[R,K] times weight[E,K,M] -> [R,M]: the first counts[0] rows by weight[0], the next counts[1] by
    weight[1], ... counts int64 [E] must sum to R. One dtype throughout.

    transposed: weight is [E,M,K], as stored by a linear layer. Prefer it over passing weight.mT: the op then
    saves the parameter itself, which ZeRO-3 can release between forward and backward. An expert without rows
    gets a zero gradient.
    """
    return _OPS["grouped_mm"](x, weight, counts, transposed=transposed)


def expert_act(
    h: Tensor,
    kind: str,
    up: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    counts: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Activation of expert rows h[R,F]: "swiglu" gives silu(h) * up[R,F], "gelu" the tanh form of GELU of h + bias.

    bias [E,F], for "gelu" alone: row r gets that of its expert, by counts[E]. gate [R], float32: a factor for each
    row, so that the products behind need none (its gradient is the scalar product of the incoming one with act(r)).
    """
    return _OPS["expert_act"](h, kind, up, bias, counts, gate)


def add_expert_bias(rows: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
    """rows[R,M] + bias[e(r)], bias [E,M], with e(r) the expert of row r as given by counts[E].

    The bias gradient is a matrix product: deterministic, accumulated in float32.
    """
    return _OPS["add_expert_bias"](rows, bias, counts)


def moe_ffn(
    x: Tensor,
    routing: Routing,
    weights: Matrices,
    kind: str,
    *,
    shared: Matrices | None = None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """The experts as one operation: sum_j gates[n,j] * E_{indices[n,j]}(x[n]) + S(x[n]), [N,D] in the dtype of x.

    weights: the stacks (w1, w2, w3) of moe.experts.Experts, of `kind` "swiglu" or "gelu". shared: matrices (s1 [Fs,D],
    s2 [D,Fs], s3 [Fs,D]) of an expert that all tokens pass, S(x) = s2 (silu(s1 x) * s3 x); on a GPU it runs beside the
    routed ones. ada_gate [B,D] and residual [N,D] end it as in sum_rows. All of the sum is in float32, rounded once.
    recompute: keep x alone for the backward pass and compute the first products again there, instead of keeping theirs
    (R x F elements, twice that for "swiglu"; of the shared expert 2 N x Fs). The reference keeps the routed experts'
    results too and computes all anew.
    """
    return _OPS["moe_ffn"](x, routing, weights, kind, shared, residual, ada_gate, recompute)


def expert_rows(rows: Tensor, counts: Tensor, weights: Matrices, kind: str, *, recompute: bool = False) -> Tensor:
    """rows[R,D], the first counts[0] for expert 0 and so on, through their experts: [R,D], without gates or sum.

    Weights as for moe_ffn. What expert parallelism calls between its two exchanges. recompute: keep `rows` alone for
    the backward pass and compute everything again there.
    """
    return _OPS["expert_rows"](rows, counts, weights, kind, recompute)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm of DiT (contracts 2.1.2): LN(x[B,T,D]) * (1 + scale[B,D]) + shift[B,D].

    LN has eps 1e-6 and no affine parameters; all in float32, returned in the dtype of x.
    """
    return _OPS["modulate"](x, shift, scale)
