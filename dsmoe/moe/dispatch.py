"""Tokens to experts and back across the ranks of an expert-parallel group (on one rank: ops.moe_ffn)."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dsmoe import ops
from dsmoe.moe.exchange import Exchange
from dsmoe.runtime import distributed

Experts = Callable[[Tensor, Tensor], Tensor]
_R = TypeVar("_R")


def across(
    x: Tensor, routing: ops.Routing, experts: Experts, group: ProcessGroup, meanwhile: Callable[[], _R]
) -> tuple[Tensor, _R]:
    """sum_j gate_nj * E_{index_nj}(x_n) for tokens x [N, D] -> [N, D] in float32 (float64 for float64), where rank r of
    `group` holds experts r*E/n .. (r+1)*E/n - 1; also the result of `meanwhile()`.

    experts: this rank's, called once with the rows of all ranks, sorted by expert, and counts int64 [E/n]; ranks may
    have different numbers of tokens, and an expert none. Rows travel by variable-size all-to-all: nothing is padded
    or dropped. The counts are exchanged once, and read by the host once. `meanwhile` runs while rows are under way.
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
    return ops.sum_rows(back.finish(), routing.order, routing.position, routing.gates), beside


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
