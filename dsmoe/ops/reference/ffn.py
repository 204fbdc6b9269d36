"""The routed experts put together from the other operations, each in its implementation of choice."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dsmoe import ops  # still being imported at this point: this module stands in its table
from dsmoe.ops.reference.routing import Routing
from dsmoe.runtime.device import beside

# An expert's, or a stack of each for all experts: first product, second, third (for "gelu" the biases).
Matrices = tuple[Tensor, Tensor, Tensor]


def moe_ffn(
    x: Tensor,
    routing: Routing,
    weights: Matrices,
    kind: str,
    shared: Matrices | None = None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """See dsmoe.ops.moe_ffn."""

    def routed(x: Tensor, *weights: Tensor) -> Tensor:
        rows = ops.gather_rows(x, routing.order, routing.position)
        return _expert_rows(rows, routing.counts, *weights, kind)

    run = _again if recompute else _once
    add = beside(lambda x: run(_shared_expert, x, *shared) if shared else None, x)
    rows = run(routed, x, *weights)
    to, end = (routing.order, routing.position, routing.gates), {"residual": residual, "ada_gate": ada_gate}
    return ops.sum_rows(rows, *to, add=add.result(), **end, narrow=True)


def expert_rows(rows: Tensor, counts: Tensor, weights: Matrices, kind: str, recompute: bool = False) -> Tensor:
    """See dsmoe.ops.expert_rows."""
    return (_again if recompute else _once)(_expert_rows, rows, counts, *weights, kind)


def _expert_rows(rows: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, kind: str) -> Tensor:
    h = ops.grouped_mm(rows, w1, counts, transposed=True)
    if kind == "swiglu":
        up = ops.grouped_mm(rows, w3, counts, transposed=True)
        return ops.grouped_mm(ops.expert_act(h, kind, up), w2, counts, transposed=True)
    b1, b2 = w3[:, 0].split((w1.shape[1], w1.shape[2]), dim=-1)
    a = ops.expert_act(h, kind, bias=b1, counts=counts)
    return ops.add_expert_bias(ops.grouped_mm(a, w2, counts, transposed=True), b2, counts)


def _shared_expert(x: Tensor, s1: Tensor, s2: Tensor, s3: Tensor) -> Tensor:
    return functional.linear(ops.expert_act(functional.linear(x, s1), "swiglu", functional.linear(x, s3)), s2)


def _once(function: Callable[..., Tensor], *given: object) -> Tensor:
    return function(*given)


def _again(function: Callable[..., Tensor], *given: object) -> Tensor:
    """function(*given), which keeps what it was given and runs once more in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*given)
    # Nothing here draws from torch's generators, so their state need not be kept.
    return checkpoint(function, *given, use_reentrant=False, preserve_rng_state=False)
