"""Every router's top-k choices in a whole run, by global sample index, so that two layouts can be compared.

The design's invariance statement: a choice may differ only where the k-th and the (k+1)-th probability are closer
than 1e-6; such flips are counted.
"""

from typing import NamedTuple

import torch

from dsmoe.runtime import distributed

TIE = 1e-6


class Decisions(NamedTuple):
    """S consecutive samples from `first`, L routers, T tokens a sample, k choices a token.

    chosen: int64 [S, L, T, k], ascending (the order of equal choices changes nothing). gap: float64 [S, L, T], the
    k-th less the (k+1)-th probability, selection bias included.
    """

    first: int
    chosen: torch.Tensor
    gap: torch.Tensor


class Choices:
    """Watches the routers of a model from now on; tell it with `begin` which samples come next.

    Make it before DeepSpeed wraps the model. A recomputed block is seen twice and recorded once.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        gates = [block.moe.gate for block in model.blocks if block.is_moe]
        for layer, gate in enumerate(gates):
            gate.register_forward_hook(lambda _, inputs, routing, layer=layer: self._see(layer, routing, inputs[1]))
        self._layers = len(gates)
        self._index: list[int] = []
        self._seen: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, index: torch.Tensor) -> None:
        """The samples int64 [B] of the next forward pass."""
        self._index = index.tolist()

    def _see(self, layer: int, routing: NamedTuple, bias: torch.Tensor | None) -> None:
        k = routing.indices.shape[1]
        scores = routing.probs.detach().double() + (0 if bias is None else bias)
        falling = scores.sort(dim=-1, descending=True).values
        chosen = routing.indices.sort(dim=-1).values.unflatten(0, (len(self._index), -1))
        gap = (falling[:, k - 1] - falling[:, k]).unflatten(0, (len(self._index), -1))
        for row, sample in enumerate(self._index):
            self._seen[sample, layer] = (chosen[row], gap[row])

    def decisions(self, samples: range, shared: bool) -> Decisions | None:
        """What was seen of these samples; None for a model without routers.

        shared: the ranks saw different samples, each exactly one rank; every rank gets all (a collective).
        """
        if not self._layers:
            return None
        shapes = [t.shape for t in next(iter(self._seen.values()))]
        chosen, gap = (torch.zeros(len(samples), self._layers, *shape, dtype=torch.float64) for shape in shapes)
        times = torch.zeros(len(samples), self._layers, dtype=torch.int64)
        for (sample, layer), (experts, gaps) in self._seen.items():
            place = (sample - samples.start, layer)
            chosen[place], gap[place] = experts.double(), gaps
            times[place] += 1
        if shared:
            for tensor in (chosen, gap, times):
                distributed.all_reduce_(tensor)
        assert bool((times == 1).all()), "a sample was routed by no rank, or by several"
        return Decisions(samples.start, chosen.long(), gap)


def compare_choices(found: Decisions | None, truth: Decisions | None) -> dict[str, int | float | None]:
    """How many token decisions were compared, how many flipped, and how many of those were no near-tie in both runs.

    first_flip: sample index. narrowest: the smallest gap of the truth. Zeros and None without routers.
    """
    if found is None or truth is None:
        assert found is truth, "only one of the two has routers"
        return {"decisions": 0, "flips": 0, "forbidden": 0, "first_flip": None, "narrowest": None}
    assert found.first == truth.first, (found.first, truth.first)
    flipped = (found.chosen != truth.chosen).any(-1)
    forbidden = flipped & ~(torch.maximum(found.gap, truth.gap) < TIE)  # so that no number is no tie
    where = flipped.flatten(1).any(1).nonzero()
    return {
        "decisions": flipped.numel(),
        "flips": int(flipped.sum()),
        "forbidden": int(forbidden.sum()),
        "first_flip": truth.first + int(where[0]) if len(where) else None,
        "narrowest": float(truth.gap.min()),
    }
