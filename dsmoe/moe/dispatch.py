"""Tokens to experts and back across the ranks of an expert-parallel group (on one rank: ops.moe_ffn)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dsmoe import ops
from dsmoe.moe.exchange import Exchange
from dsmoe.runtime import distributed

Experts = Callable[[Tensor, Tensor], Tensor]


def across(
    x: Tensor,
    routing: ops.Routing,
    experts: Experts,
    group: ProcessGroup,
    meanwhile: Callable[[], Tensor | None],
    *,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
) -> Tensor:
    """sum_j gate_nj * E_{index_nj}(x_n) + meanwhile()_n for tokens x [N, D] -> [N, D] in the dtype of x, where rank r
    of `group` holds experts r*E/n .. (r+1)*E/n - 1; ada_gate [B, D] and residual [N, D] end it as in ops.sum_rows.

    experts: this rank's, called once with the rows of all ranks, sorted by expert, and counts int64 [E/n]; ranks may
    have different numbers of tokens, and an expert none. Rows travel by variable-size all-to-all: nothing is padded
    or dropped. The counts are exchanged once, and read by the host once. `meanwhile` (the shared expert) runs while
    rows are under way.
    """
    world = distributed.world_size(group)
    leaving = routing.counts.view(world, -1)  # [destination, its experts]
    arriving = distributed.all_to_all(leaving, group)  # [source, experts here]
    send, receive = torch.stack([leaving.sum(1), arriving.sum(1)]).tolist()
    there, back = Exchange(send, receive, group), Exchange(receive, send, group)
    there.start(ops.gather_rows(x, routing.order, routing.position))
    beside = meanwhile()
    received = there.finish()
    by_expert, by_source = _orders(arriving, sum(receive))
    rows = ops.gather_rows(received, by_expert, by_source[:, None])
    rows = experts(rows, arriving.sum(0))
    back.start(ops.gather_rows(rows, by_source, by_expert[:, None]))
    to, end = (routing.order, routing.position, routing.gates), {"residual": residual, "ada_gate": ada_gate}
    return ops.sum_rows(back.finish(), *to, add=beside, **end, narrow=True)


def _orders(arriving: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Rows come by source, within it by expert; counts [source, expert]. int64 [total] twice: the arrived row at
    each place of the order by expert, and the place in that order of each arrived row."""
    sources, count = arriving.shape
    expert = torch.arange(count, device=arriving.device).repeat(sources)
    expert = torch.repeat_interleave(expert, arriving.flatten(), output_size=total)
    by_expert = expert.argsort(stable=True)
    by_source = torch.empty_like(by_expert)
    by_source[by_expert] = torch.arange(total, device=arriving.device)
    return by_expert, by_source
