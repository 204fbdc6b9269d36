"""Times and noise of training samples: their laws (scipy), and that they depend on the sample index alone."""

import numpy as np
import pytest
import torch
from scipy import stats

from dsmoe.base.diffusion import DiffusionSpec
from dsmoe.diffusion.noise import level_sizes, multi_resolution
from dsmoe.ops import random
from dsmoe.tasks.noising import Noising

INDEX = torch.arange(20000) + 10**10
FLOW = {"prediction": "velocity", "schedule": "rectified_flow"}
SPECS = {
    "steps": DiffusionSpec(),
    "steps, multi-resolution": DiffusionSpec(noise="multi_resolution"),
    "flow": DiffusionSpec(**FLOW),
    "flow, logit-normal, multi-resolution": DiffusionSpec(
        **FLOW, time_density="logit_normal", noise="multi_resolution"
    ),
}


def test_timesteps_are_uniform_over_the_whole_range():
    t = Noising(DiffusionSpec(timesteps=50), 3).times(INDEX)
    assert t.dtype == torch.int64
    assert (t.min(), t.max()) == (0, 49)
    assert stats.chisquare(np.bincount(t.numpy(), minlength=50)).pvalue > 1e-6


def test_times_of_the_flow_are_uniform_above_zero():
    t = Noising(SPECS["flow"], 3).times(INDEX)
    assert t.dtype == torch.float32
    assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-6
    # Uniform numbers can be 0 and never 1: t can be 1, pure noise, and never 0.
    assert torch.equal(t, 1 - random.uniform(3, "timestep", INDEX))


def test_logit_normal_times_have_normal_logits_inside_zero_and_one():
    t = Noising(SPECS["flow, logit-normal, multi-resolution"], 3).times(INDEX)
    assert t.dtype == torch.float32
    assert 0 < t.min() < t.max() < 1
    logits = np.log(t.double().numpy()) - np.log1p(-t.double().numpy())
    assert stats.kstest(logits, "norm").pvalue > 1e-6
    # The density of sigmoid(N(0, 1)), bin by bin.
    edges = np.linspace(0, 1, 11)
    mass = np.diff(stats.norm.cdf(np.log(np.clip(edges, 1e-300, None)) - np.log(np.clip(1 - edges, 1e-300, None))))
    assert stats.chisquare(np.histogram(t.numpy(), edges)[0], mass * len(t)).pvalue > 1e-6


def test_gaussian_noise_is_standard_normal_whatever_the_time():
    noising = Noising(SPECS["steps"], 3)
    noise = noising.noise(INDEX[:5000], (1, 2, 3), noising.times(INDEX[:5000]))
    assert noise.dtype == torch.float32
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-6
    assert torch.equal(noise, noising.noise(INDEX[:5000], (1, 2, 3), torch.zeros(5000)))


@pytest.mark.parametrize("name", SPECS)
def test_a_sample_is_the_same_in_any_batch(name):
    noising, index = Noising(SPECS[name], 3), INDEX[:64]
    times = noising.times(index)
    noise = noising.noise(index, (4, 8, 8), times)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    for size in (1, 10):
        parts = index[order].split(size)
        assert torch.equal(torch.cat([noising.times(part) for part in parts]), times[order])
        again = [noising.noise(part, (4, 8, 8), noising.times(part)) for part in parts]
        assert torch.equal(torch.cat(again), noise[order])
    assert not torch.equal(Noising(SPECS[name], 4).times(index), times)


@pytest.mark.parametrize(
    ("name", "share"), [("steps, multi-resolution", 1000), ("flow, logit-normal, multi-resolution", 1)]
)
def test_multi_resolution_is_annealed_by_the_time(name, share):
    """Strength 0.9 t / T of numbers that are drawn for their own purposes (contracts 4.5)."""
    noising, index = Noising(SPECS[name], 3), INDEX[:40]
    times = noising.times(index)
    got = noising.noise(index, (2, 16, 8), times)
    sizes = level_sizes(16, 8)
    flat = random.normal(3, "noise_levels", index, (sum(2 * h * w for h, w in sizes),))
    levels, start = [], 0
    for h, w in sizes:
        levels.append(flat[:, start : start + 2 * h * w].view(40, 2, h, w))
        start += 2 * h * w
    ratio = 2 + 2 * random.uniform(3, "noise_ratio", index, (len(sizes),))
    base = random.normal(3, "noise", index, (2, 16, 8))
    torch.testing.assert_close(got, multi_resolution(base, levels, ratio, 0.9 * times / share), rtol=1e-6, atol=1e-6)
    assert not torch.equal(got, base)


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    noising = Noising(SPECS["steps, multi-resolution"], 3)
    noising.noise(INDEX[:8], (4, 8, 8), noising.times(INDEX[:8]))
    assert torch.equal(before, torch.get_rng_state())
