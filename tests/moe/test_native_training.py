"""Reference and compiled operations give the same training run, compiled and recomputed too (invariance statement)."""

import functools

import pytest
import torch
from fp64_truth import needs_kernels
from torch.utils.checkpoint import checkpoint

from dsmoe import ops
from dsmoe.base.presets import ModelSpec
from dsmoe.moe import MoE

STEPS = 6


def train(kind: str, implementation: str, wrap=lambda layer: layer) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of every step and the weights at the end; fp32, AdamW eps 1e-8, clipping, balance and z losses."""
    torch.manual_seed(0)
    layer = MoE(ModelSpec(depth=1, dim=32, heads=1, num_experts=4, expert_kind=kind, shared_ratio=1.0))
    call = wrap(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3, eps=1e-8)
    generator, losses = torch.Generator().manual_seed(1), []
    ops.prefer({op: implementation for op, _, names in ops.implementations("cpu") if implementation in names}, "cpu")
    try:
        for _ in range(STEPS):
            x = torch.randn(4, 40, 32, generator=generator)
            y, stats = call(x)
            loss = (y - 0.5 * x).square().mean() + 0.01 * stats.balance_loss + 0.001 * stats.z_loss
            optimizer.zero_grad()
            loss.backward()
            assert torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.1) > 0.1, "nothing was clipped"
            optimizer.step()
            losses.append(loss.item())
    finally:
        ops.prefer({}, "cpu")
    return losses, {name: p.detach() for name, p in layer.named_parameters()}


WAYS = {
    "plain": lambda layer: layer,
    "recomputed": lambda layer: functools.partial(checkpoint, layer, use_reentrant=False),
    "compiled": lambda layer: torch.compile(layer, fullgraph=True, backend="aot_eager"),
}


@needs_kernels
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_the_run_is_the_same(kind, way):
    losses, weights = train(kind, "native", WAYS[way])
    expected, truth = train(kind, "reference")
    assert losses == pytest.approx(expected, rel=1e-6)
    for name, weight in weights.items():
        if truth[name].norm():
            assert (weight - truth[name]).norm() <= 1e-5 * truth[name].norm(), name
    assert abs(losses[-1] - losses[0]) > 1e-3 * losses[0], "nothing was trained"
