"""The routed experts put together from the other operations, each in its implementation of choice."""

from torch import Tensor

from dsmoe import ops  # still being imported at this point: this module stands in its table
from dsmoe.ops.reference.routing import Routing


def moe_ffn(
    x: Tensor,
    routing: Routing,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    kind: str,
    add: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """See dsmoe.ops.moe_ffn."""
    rows = ops.gather_rows(x, routing.order, routing.position)
    rows = expert_rows(rows, routing.counts, w1, w2, w3, kind)
    return ops.sum_rows(rows, routing.order, routing.position, routing.gates, add=add).to(x.dtype)


def expert_rows(rows: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, kind: str) -> Tensor:
    """Rows [R, D], sorted by expert, through their experts, without gates: [R, D]."""
    h = ops.grouped_mm(rows, w1, counts, transposed=True)
    if kind == "swiglu":
        up = ops.grouped_mm(rows, w3, counts, transposed=True)
        return ops.grouped_mm(ops.expert_act(h, kind, up), w2, counts, transposed=True)
    b1, b2 = w3[:, 0].split((w1.shape[1], w1.shape[2]), dim=-1)
    a = ops.expert_act(h, kind, bias=b1, counts=counts)
    return ops.add_expert_bias(ops.grouped_mm(a, w2, counts, transposed=True), b2, counts)
