"""Top-k softmax routing."""

from typing import NamedTuple

import torch
from torch import Tensor

from dsmoe.ops.precision import maths_dtype


class Routing(NamedTuple):
    """Where N tokens go. A slot is (token n, choice j), number n * k + j; a row is a slot in expert order.

    probs      [N, E]  softmax over all experts, float32 (float64 for float64 tokens)
    gates      [N, k]  probabilities of the chosen experts, in order of choice, same dtype
    indices    [N, k]  int64, the chosen experts
    counts     [E]     int64, rows of each expert
    order      [N*k]   int64, slot of each row: rows of expert 0 first, within an expert in slot order
    position   [N, k]  int64, row of each slot (the inverse of order)
    logsumexp  [N]     log of the softmax denominator, for the z-loss
    ends       [E]     int32, running sum of counts: the row behind each expert's last
    prob_sum   [E]     probs summed over the tokens
    """

    probs: Tensor
    gates: Tensor
    indices: Tensor
    counts: Tensor
    order: Tensor
    position: Tensor
    logsumexp: Tensor
    ends: Tensor
    prob_sum: Tensor


def route(x: Tensor, weight: Tensor, k: int, renormalize: bool, bias: Tensor | None = None) -> Routing:
    """See dsmoe.ops.route."""
    dtype = maths_dtype(x)
    logits = x.to(dtype) @ weight.to(dtype).T
    probs = logits.softmax(-1)
    # topk leaves the order of ties open; a stable sort gives them to the lower index.
    scores = probs.detach() if bias is None else probs.detach() + bias
    indices = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    gates = probs.gather(1, indices)
    if renormalize:
        gates = gates / gates.sum(-1, keepdim=True)
    counts, ends, order = _sort_slots(indices, weight.shape[0])
    position = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    position = position.view(indices.shape)
    return Routing(probs, gates, indices, counts, order, position, logits.logsumexp(-1), ends, probs.sum(0))


def _sort_slots(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows per expert, their running sum, and the stable order of the slots: no host wait, no atomics."""
    experts, order = indices.flatten().to(torch.int16).sort(stable=True)  # 16-bit keys sort 4x faster
    every = torch.arange(num_experts, dtype=torch.int16, device=indices.device)
    ends = torch.searchsorted(experts, every, right=True)
    return ends.diff(prepend=ends.new_zeros(1)), ends.to(torch.int32), order
