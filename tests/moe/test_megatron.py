"""Megatron-core's routing, permutation and balance functions agree with ours on random inputs: an independent opinion.

Skipped where megatron-core is not installed (`pip install --no-deps megatron-core`; extra `megatron`).
"""

import pytest
import torch

from dsmoe import ops
from dsmoe.moe import balance

moe_utils = pytest.importorskip(
    "megatron.core.transformer.moe.moe_utils", reason="megatron-core is not installed (extra `megatron`)"
)

SHAPES = [(1, 4, 1), (37, 8, 2), (256, 16, 2), (64, 8, 4)]  # tokens, experts, k


def draw(tokens, experts, dim=12):
    generator = torch.Generator().manual_seed(tokens + experts)
    return torch.randn(tokens, dim, generator=generator), torch.randn(experts, dim, generator=generator)


@pytest.mark.parametrize(("tokens", "experts", "k"), SHAPES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_routing(tokens, experts, k, renormalize):
    x, weight = draw(tokens, experts)
    ours = ops.route(x, weight, k, renormalize)
    # Softmax over all experts first is DiT-MoE's; after the choice is the same as renormalising.
    probs, chosen = moe_utils.topk_routing_with_score_function(x @ weight.T, k, use_pre_softmax=not renormalize)
    gates = torch.zeros_like(probs).scatter(1, ours.indices, ours.gates)
    assert torch.equal(gates > 0, chosen)
    torch.testing.assert_close(gates, probs, rtol=1e-6, atol=1e-7)
    assert torch.equal(ours.counts, chosen.sum(0))


@pytest.mark.parametrize(("tokens", "experts", "k"), SHAPES)
def test_permutation_and_its_way_back(tokens, experts, k):
    x, weight = draw(tokens, experts)
    ours = ops.route(x, weight, k, False)
    chosen = torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, ours.indices, True)
    probs = torch.zeros(tokens, experts).scatter(1, ours.indices, ours.gates)
    rows, _, places = moe_utils.permute(x, chosen, num_out_tokens=tokens * k)
    assert torch.equal(ops.gather_rows(x, ours.order, ours.position), rows)
    made = torch.tanh(rows)
    back = moe_utils.unpermute(made, places, x.shape, probs=probs, routing_map=chosen)
    torch.testing.assert_close(ops.sum_rows(made, ours.order, ours.position, ours.gates), back, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("tokens", "experts", "k"), SHAPES)
def test_balance_and_z_losses(tokens, experts, k):
    x, weight = draw(tokens, experts)
    ours = ops.route(x, weight, k, False)
    theirs = moe_utils.switch_load_balancing_loss_func(ours.probs, ours.counts, tokens, k, experts, 1.0)
    torch.testing.assert_close(balance.micro_balance(ours.probs[None], ours.counts[None]), theirs, rtol=1e-6, atol=0)
    theirs = moe_utils.z_loss_func(x @ weight.T, 1.0)
    torch.testing.assert_close(balance.z_loss(ours.logsumexp), theirs, rtol=1e-6, atol=0)
