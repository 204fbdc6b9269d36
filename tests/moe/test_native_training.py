"""Reference and compiled operations give the same training run, with and without torch.compile and whatever is computed
again (invariance statement). The layer ends a DiT block: adaLN gate and residual are inside."""

import functools

import pytest
import torch
from fp64_truth import BOTH
from torch.utils.checkpoint import checkpoint

from dsmoe import ops
from dsmoe.base.presets import ModelSpec
from dsmoe.moe import MoE

STEPS = 6


def train(kind: str, implementation: str, wrap=lambda layer: layer) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of every step and the weights at the end; fp32, AdamW eps 1e-8, clipping, balance and z losses."""
    torch.manual_seed(0)
    layer = MoE(ModelSpec(depth=1, dim=32, heads=1, num_experts=4, expert_kind=kind, shared_ratio=1.0))
    ada_gate = torch.nn.Parameter(0.5 + torch.rand(4, 32))
    call, trained = wrap(layer), {"ada_gate": ada_gate, **dict(layer.named_parameters())}
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3, eps=1e-8)
    generator, losses = torch.Generator().manual_seed(1), []
    ops.prefer({op: implementation for op, _, names in ops.implementations("cpu") if implementation in names}, "cpu")
    try:
        for _ in range(STEPS):
            x = torch.randn(4, 40, 32, generator=generator)
            y, stats = call(x, residual=x, ada_gate=ada_gate)
            loss = (y - 0.5 * x).square().mean() + 0.01 * stats.balance_loss + 0.001 * stats.z_loss
            optimizer.zero_grad()
            loss.backward()
            assert torch.nn.utils.clip_grad_norm_(trained.values(), 0.1) > 0.1, "nothing was clipped"
            optimizer.step()
            losses.append(loss.item())
    finally:
        ops.prefer({}, "cpu")
    return losses, {name: p.detach() for name, p in trained.items()}


def lean(layer):
    layer.experts.recompute = True
    return layer


def compiled(layer):
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


def again(layer):
    return functools.partial(checkpoint, layer, use_reentrant=False)


# What dsmoe.activation_checkpointing may be: false, true (there around the whole block), "experts".
WAYS = {
    "kept": lambda layer: layer,
    "recomputed": again,
    "experts": lean,
    "kept, compiled": compiled,
    "recomputed, compiled": lambda layer: compiled(again(layer)),
    "experts, compiled": lambda layer: compiled(lean(layer)),
}


@functools.cache
def plain_reference(kind):
    return train(kind, "reference")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_the_run_is_the_same(kind, implementation, way):
    losses, weights = train(kind, implementation, WAYS[way])
    expected, truth = plain_reference(kind)
    assert losses == pytest.approx(expected, rel=1e-6)
    for name, weight in weights.items():
        if truth[name].norm():
            assert (weight - truth[name]).norm() <= 1e-5 * truth[name].norm(), name
    assert abs(losses[-1] - losses[0]) > 1e-3 * losses[0], "nothing was trained"
