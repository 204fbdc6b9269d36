"""Euler on rectified flow against Gaussian data, where every step is an affine map known in closed form.

Data x0 ~ N(mu, diag(s^2)): x_t = (1 - t) x0 + t noise is N((1 - t) mu, D_t), D_t = (1 - t)^2 s^2 + t^2, and the best
velocity E[noise - x0 | x_t] is (t - (1 - t) s^2) / D_t (x_t - (1 - t) mu) - mu.
"""

import numpy as np
import pytest
import torch

from dsmoe.base.errors import ConfigError
from dsmoe.diffusion.flow import RectifiedFlow
from dsmoe.diffusion.samplers import euler

MU = np.array([0.7, -1.3, 0.0])
S2 = np.array([0.25, 1.0, 0.04])
FLOW = RectifiedFlow()


def per_channel(values):
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def best_velocity(x, t):
    # float32 times of i / N are 3e-8 off; the tests' own times are read back from them, as a network would.
    t = t.double().view(-1, 1, 1, 1)
    spread = (1 - t) ** 2 * per_channel(S2) + t**2
    return (t - (1 - t) * per_channel(S2)) / spread * (x - (1 - t) * per_channel(MU)) - per_channel(MU)


def affine_map(steps):
    """(slope, offset) per channel of the walk from x_1, which is affine and diagonal."""
    basis = torch.stack([torch.zeros(3), torch.ones(3)]).double().view(2, 3, 1, 1)
    zero, one = euler(best_velocity, basis, FLOW, steps).flatten(1).numpy()
    return one - zero, zero


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 50, 250])
def test_euler_is_the_closed_form_map(steps):
    """Around its centre (1 - t) mu, which the walk follows exactly, a step scales the deviation by

    1 - (t - (1 - t) s^2) / (N D_t).
    """
    slope = np.ones(3)
    for i in range(steps, 0, -1):
        t = i / steps
        slope *= 1 - (t - (1 - t) * S2) / ((1 - t) ** 2 * S2 + t**2) / steps
    got = affine_map(steps)
    # Times in fp32 are off by 2^-25 at most; measured 2.1e-8.
    np.testing.assert_allclose(got[0], slope, rtol=0, atol=1e-7)
    np.testing.assert_allclose(got[1], MU, rtol=0, atol=1e-7)


def test_mean_is_exact_and_the_variance_error_is_first_order():
    """The flow maps noise of unit variance to s exactly; measured slopes -0.97 to -0.98."""
    counts = [20, 40, 80, 160, 320, 640]
    errors = np.array([np.abs(affine_map(n)[0] ** 2 - S2) for n in counts])
    for channel in range(3):
        order = np.polyfit(np.log(counts), np.log(errors[:, channel]), 1)[0]
        assert -1.25 < order < -0.85


def test_a_straight_flow_needs_one_step():
    """For a single image x0 every path is straight: one step lands on it."""
    x0 = torch.linspace(-1, 1, 12, dtype=torch.float64).view(1, 3, 2, 2)
    noise = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = euler(lambda x, t: (x - x0) / t.double().view(-1, 1, 1, 1), noise, FLOW, 1)
    torch.testing.assert_close(got, x0.expand_as(got), rtol=0, atol=1e-15)


def test_networks_are_told_i_over_n_in_fp32_and_variance_channels_are_dropped():
    told, calls = [], []

    def model(x, t):
        assert (x.dtype, t.dtype) == (torch.float32, torch.float32)
        told.append(t.tolist())
        return torch.cat([torch.ones_like(x), torch.full_like(x, torch.nan)], 1).bfloat16()

    start = torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16)
    out = euler(model, start, FLOW, 4, callback=lambda i, n, x: calls.append((i, n, x[0, 0, 0, 0].item())))
    assert told == [[1.0] * 2, [0.75] * 2, [0.5] * 2, [0.25] * 2]
    assert calls == [(0, 4, -0.25), (1, 4, -0.5), (2, 4, -0.75), (3, 4, -1.0)]
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.full_like(out, -1.0))


def test_no_steps_are_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        euler(best_velocity, torch.zeros(1, 3, 1, 1), FLOW, 0)
