"""Tokens to experts and back on one rank. Experts on other ranks are the engine's layer's business."""

from collections.abc import Callable

from torch import Tensor

from dsmoe import ops


def local(x: Tensor, routing: ops.Routing, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """sum_j gate_nj * E_{index_nj}(x_n) for tokens x [N, D] -> [N, D] in float32 (float64 for float64).

    No capacity: every chosen expert sees the token. `experts(rows, counts)` is called once.
    """
    rows = ops.gather_rows(x, routing.order, routing.position)
    return ops.sum_rows(experts(rows, routing.counts), routing.order, routing.position, routing.gates)
