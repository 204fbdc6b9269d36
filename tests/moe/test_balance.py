"""Balance and z losses: closed forms, decomposition, gradients."""

import math

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dsmoe.base.presets import ModelSpec
from dsmoe.moe import MoE, balance


def draw(b=4, t=6, e=5, k=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    probs = torch.randn(b, t, e, generator=g, dtype=torch.float64).softmax(-1)
    indices = probs.topk(k).indices.view(b * t, k)
    return probs, indices, balance.counts_per_sample(indices, b, e)


def test_counts_per_sample_against_numpy():
    _, indices, counts = draw()
    expected = [np.bincount(row, minlength=5) for row in indices.view(4, 12).numpy()]
    assert np.array_equal(counts, expected)


def test_sample_scope_against_loops():
    probs, indices, counts = draw()
    total = 0.0
    for b in range(4):
        for e in range(5):
            count = sum(int(i) == e for i in indices.view(4, -1)[b])
            total += 5 / (6 * 2) * count * float(probs[b, :, e].mean())
    assert balance.sample_balance(probs, counts).item() == pytest.approx(total / 4, rel=1e-12)


def test_sample_scope_decomposes_over_images():
    probs, _, counts = draw(b=6)
    whole = balance.sample_balance(probs, counts)
    halves = [balance.sample_balance(probs[s], counts[s]) for s in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(torch.stack(halves).mean(), whole, rtol=1e-14, atol=0)


def test_perfect_balance_gives_one_and_collapse_gives_e():
    uniform = torch.full((2, 4, 4), 0.25, dtype=torch.float64)
    even = torch.full((2, 4), 2)
    collapsed = torch.zeros(2, 4, 4, dtype=torch.float64)
    collapsed[..., 1] = 1
    one = torch.tensor([0, 8, 0, 0]).expand(2, 4)
    for loss in (balance.sample_balance, balance.micro_balance):
        assert loss(uniform, even).item() == pytest.approx(1)
        assert loss(collapsed, one).item() == pytest.approx(4)
    assert balance.step_balance(uniform, torch.full((4,), 0.25)).item() == pytest.approx(1)
    assert balance.step_balance(collapsed, torch.tensor([0.0, 1, 0, 0])).item() == pytest.approx(4)


def test_micro_scope_against_the_published_formula():
    """sum_e P_e f_e, f_e = E * mean over tokens * K of the one-hot choices (contracts 2.2)."""
    probs, indices, counts = draw()
    one_hot = np.eye(5)[indices.numpy().ravel()]
    expected = (probs.numpy().reshape(-1, 5).mean(0) * one_hot.mean(0) * 5).sum()
    assert balance.micro_balance(probs, counts).item() == pytest.approx(expected, rel=1e-12)


def test_scopes_agree_for_one_image_and_differ_otherwise():
    probs, _, counts = draw(b=1)
    assert torch.equal(balance.sample_balance(probs, counts), balance.micro_balance(probs, counts))
    probs, _, counts = draw(b=4)
    assert not torch.isclose(balance.sample_balance(probs, counts), balance.micro_balance(probs, counts))


def test_the_gradient_pushes_probability_away_from_busy_experts():
    probs, _, counts = draw()
    probs.requires_grad_()
    balance.sample_balance(probs, counts).backward()
    # d/dp_bte = E * share_be / (B T): proportional to the load of the image.
    expected = 5 * counts.double() / 12 / (4 * 6)
    torch.testing.assert_close(probs.grad, expected[:, None].expand_as(probs))


def test_z_loss_is_the_mean_square_and_zero_without_tokens():
    values = torch.tensor([1.0, -2.0, 3.0])
    assert balance.z_loss(values).item() == pytest.approx(14 / 3)
    assert balance.z_loss(torch.full((7,), math.log(8.0))).item() == pytest.approx(math.log(8) ** 2)
    assert balance.z_loss(values[:0]).item() == 0


def test_the_selection_bias_moves_against_the_load_by_whole_steps():
    step = balance.selection_bias_step(torch.tensor([10.0, 4.0, 2.0, 0.0], dtype=torch.float64), 0.01)
    assert step.tolist() == pytest.approx([-0.01, 0.0, 0.01, 0.01])
    assert balance.selection_bias_step(torch.full((8,), 3.0), 0.01).tolist() == [0.0] * 8


def test_a_biased_router_spreads_its_tokens_without_a_loss():
    torch.manual_seed(0)
    moe = MoE(ModelSpec(depth=1, dim=16, heads=1, num_experts=4, top_k=1), balance_scope="none", selection_bias=True)
    x = torch.randn(4, 64, 16)
    x[..., 0] = x[..., 0].abs() + 1
    with torch.no_grad():
        moe.gate.weight[2, 0] += 2
    start = moe(x)[1].load
    loads = []
    for _ in range(300):
        load = moe(x)[1].load
        loads.append(load)
        moe.update_selection_bias((load.double() * 256).round(), 0.01)
    assert start.max() > 0.8
    # Steps of one size oscillate about the balance: their mean over many steps is what settles.
    assert torch.stack(loads[-200:]).mean(0).max() < 0.3
    assert moe.selection_bias[2] < moe.selection_bias[[0, 1, 3]].min()
    assert "selection_bias" in moe.state_dict()
    assert MoE(ModelSpec(depth=1, dim=16, heads=1, num_experts=4)).state_dict().keys() == moe.state_dict().keys() - {
        "selection_bias"
    }


@pytest.mark.parametrize("scope", ["sample", "step", "micro"])
def test_loss_scale_recomputation_and_accumulation_reach_the_balance_loss(scope):
    """Published layers add it to the gradient past the loss scale, which makes it 65,536 times too small under fp16."""
    spec = ModelSpec(depth=1, dim=16, heads=1, num_experts=4, shared_ratio=1.0)
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))

    def gradients(coefficient, scale=1.0, recompute=False, parts=1):
        torch.manual_seed(0)
        moe = MoE(spec, balance_scope=scope)
        moe.update_previous_load(torch.tensor([0.4, 0.3, 0.2, 0.1]))
        for part in x.chunk(parts):
            y, stats = checkpoint(moe, part, use_reentrant=False) if recompute else moe(part)
            loss = y.square().mean() + coefficient * stats.balance_loss + 0.1 * coefficient * stats.z_loss
            (scale * loss / parts).backward()
        return torch.cat([p.grad.flatten() / scale for p in moe.parameters()])

    plain, without = gradients(0.5), gradients(0.0)
    assert (plain - without).norm() > 1e-2 * without.norm(), "the balance loss hardly matters here"
    assert torch.equal(gradients(0.5, scale=2.0**16), plain), "a power of two rounds nothing"
    torch.testing.assert_close(gradients(0.5, recompute=True), plain, rtol=0, atol=0)
    if scope != "micro":  # whose statistics are those of the micro-batch, by definition
        torch.testing.assert_close(gradients(0.5, parts=2), plain, rtol=1e-4, atol=1e-6)
