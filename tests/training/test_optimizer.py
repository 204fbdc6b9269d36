"""AdamW in every implementation against a hand-written one, and the learning rate against its closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch

from dsmoe.base.errors import ConfigError
from dsmoe.base.recipe import OptimizerSpec
from dsmoe.training.optimizer import build_optimizer, choose_implementation, learning_rate

SPEC = OptimizerSpec(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
STEPS = 5


def numpy_adamw(weights, gradients, rates, spec):
    """Loshchilov & Hutter 2019, algorithm 2 (decay decoupled from the gradient and scaled by the rate), in float64."""
    w = weights.astype(np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = spec.betas[0] * m + (1 - spec.betas[0]) * g
        v = spec.betas[1] * v + (1 - spec.betas[1]) * g**2
        m_hat, v_hat = m / (1 - spec.betas[0] ** t), v / (1 - spec.betas[1] ** t)
        w = w - rate * spec.weight_decay * w - rate * m_hat / (np.sqrt(v_hat) + spec.eps)
    return w


@pytest.mark.parametrize("implementation", ["torch", "torch_fused"])
def test_every_implementation_is_adamw(implementation):
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape).astype(np.float32) for shape in ((7, 5), (11,))]
    # Scales from 1e-6 to 1e2: where eps matters and where it does not.
    gradients = [
        [(rng.standard_normal(w.shape) * 10.0 ** rng.integers(-6, 3, w.shape)).astype(np.float32) for w in start]
        for _ in range(STEPS)
    ]
    rates = [SPEC.lr * f for f in (0.0, 0.5, 1.0, 0.7, 0.1)]
    parameters = [torch.nn.Parameter(torch.tensor(w)) for w in start]
    optimizer = build_optimizer(parameters, SPEC, implementation)
    for step_gradients, rate in zip(gradients, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p, g in zip(parameters, step_gradients, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
    for i, p in enumerate(parameters):
        want = numpy_adamw(start[i], [g[i].astype(np.float64) for g in gradients], rates, SPEC)
        # Weights of order 1 after five fp32 updates: a few units in the last place of 1.
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=0, atol=8 * np.finfo(np.float32).eps)
        assert np.abs(want - start[i]).max() > 5e-3, "the steps moved the weights far more than the tolerance"


def test_optimizer_has_one_group_with_the_recipes_numbers():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    (group,) = build_optimizer(parameters, SPEC, "torch").param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in parameters]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-3, (0.9, 0.95), 1e-8, 0.1)


@pytest.mark.parametrize(
    ("requested", "device", "offload", "chosen"),
    [
        ("auto", "cpu", False, "torch_fused"),
        ("auto", "cpu", True, "cpu_adam"),
        ("auto", "cuda", True, "cpu_adam"),
        ("torch", "cuda", True, "torch"),
        ("torch", "cpu", False, "torch"),
        ("torch_fused", "cuda", False, "torch_fused"),
        ("cpu_adam", "cpu", False, "cpu_adam"),
    ],
)
def test_choice_of_implementation(requested, device, offload, chosen):
    assert choose_implementation(requested, device_type=device, offload=offload) == chosen


def test_auto_takes_apex_on_a_gpu_where_it_is_found(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "apex" else None)
    assert choose_implementation("auto", device_type="cuda", offload=False) == "apex"
    assert choose_implementation("auto", device_type="cpu", offload=False) == "torch_fused"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_implementation("auto", device_type="cuda", offload=False) == "torch_fused"


def test_apex_asked_for_and_not_there_is_a_users_mistake():
    with pytest.raises(ConfigError, match=r"dsmoe\.optimizer is apex.*use auto or torch_fused"):
        choose_implementation("apex", device_type="cpu", offload=False)


def test_constant_rate_is_constant():
    spec = OptimizerSpec(lr=1e-4)
    assert {learning_rate(spec, n, 10**6) for n in (0, 1, 999, 10**6, 2 * 10**6)} == {1e-4}


# Peak, warm-up and total images, final share: Marigold's (100 of 25k iterations of 32 images, contracts 4.7), the
# paper's (30k of 1024 and 6k of 4096, same place), and shapes of our own at the edges.
SHAPES = [
    (3e-5, 100 * 32, 25_000 * 32, 0.01),
    (3e-5, 100 * 1024, 30_000 * 1024, 0.01),
    (1.2e-4, 100 * 4096, 6_000 * 4096, 0.01),
    (1e-3, 5000, 80000, 0.05),
    (1e-3, 0, 1000, 0.5),
    (1e-3, 0, 1000, 1.0),
    (1e-3, 999, 1000, 0.1),
]


@pytest.mark.parametrize(("peak", "warmup", "total", "ratio"), SHAPES)
def test_rate_follows_its_closed_form(peak, warmup, total, ratio):
    spec = OptimizerSpec(lr=peak, schedule="exponential", warmup_images=warmup, final_ratio=ratio)
    for n in range(0, total + 1, max(1, total // 997)):
        after = max(n - warmup, 0) / (total - warmup)
        want = peak * n / warmup if n < warmup else peak * math.exp(math.log(ratio) * after)
        assert learning_rate(spec, n, total) == pytest.approx(want, rel=1e-12)
    assert learning_rate(spec, warmup, total) == peak
    assert learning_rate(spec, total, total) == pytest.approx(peak * ratio, rel=1e-12)
    assert learning_rate(spec, 3 * total, total) == pytest.approx(peak * ratio, rel=1e-12), "and stays there"
    if warmup:
        assert learning_rate(spec, 0, total) == 0


def test_decay_by_equal_factors_over_equal_stretches():
    spec = OptimizerSpec(lr=1e-3, schedule="exponential", warmup_images=100, final_ratio=0.01)
    rates = [learning_rate(spec, n, 1100) for n in range(100, 1101, 100)]
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([0.01**0.1] * 10, rel=1e-12)


def test_warm_up_of_a_constant_schedule_ends_at_the_peak():
    spec = OptimizerSpec(lr=2e-4, warmup_images=1000)
    assert [learning_rate(spec, n, 5000) for n in (0, 250, 500, 1000, 5000)] == [0, 5e-5, 1e-4, 2e-4, 2e-4]
