"""Samplers against Gaussian data, where every step is an affine map known in closed form.

Data x0 ~ N(mu, diag(s^2)): x_t is N(sqrt(abar) mu, D) with D = abar s^2 + 1 - abar, and the best epsilon is
sqrt(1 - abar) (x_t - sqrt(abar) mu) / D. The tests keep their own alpha_bar (numpy, from the definition).
Euler on rectified flow: test_euler_gaussian.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from dsmoe.diffusion.objective import PREDICTIONS
from dsmoe.diffusion.samplers import ancestral, ddim
from dsmoe.diffusion.schedules import SPACINGS, iddpm_timesteps, make_schedule, spaced_timesteps

MU = np.array([0.7, -1.3, 0.0])
S2 = np.array([0.25, 1.0, 0.04])
LINEAR = make_schedule("linear")
COUNTS = [1, 2, 5, 10, 50, 250]
NAMES = ["linear", "scaled_linear", "cosine"]


def own_alpha_bar(name):
    if name == "linear":
        betas = np.linspace(1e-4, 0.02, 1000)
    elif name == "scaled_linear":
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    else:
        level = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - level[1:] / level[:-1], 0.999)
    return np.cumprod(1 - betas)


def own_timesteps(spacing, count):
    """Decreasing steps, written from the definitions (counts here round no exact half)."""
    if spacing == "leading":
        return [(count - 1 - i) * (1000 // count) for i in range(count)]
    if spacing == "trailing":
        return [round(1000 - i * 1000 / count) - 1 for i in range(count)]
    return [int(v) for v in np.round(np.linspace(0, 999, count))[::-1]]


def per_channel(values):
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def bayes_model(bar, prediction="epsilon", fraction=None):
    """The optimal network for the Gaussian data: told t, it answers in the wanted parameterisation.

    fraction: t -> value of the variance channels (per channel array), appended when given.
    """

    def model(x, t):
        step = int(t[0].item())
        a, s = math.sqrt(bar[step]), math.sqrt(1 - bar[step])
        centred = x - a * per_channel(MU)
        spread = per_channel(bar[step] * S2 + 1 - bar[step])
        x0 = per_channel(MU) + a * per_channel(S2) / spread * centred
        noise = s / spread * centred
        answer = {"epsilon": noise, "x0": x0, "v": a * noise - s * x0}[prediction]
        if fraction is None:
            return answer
        return torch.cat([answer, per_channel(fraction(step)).expand_as(x)], 1)

    return model


def affine_map(sampler):
    """(slope, offset) per channel of a sampler x_T -> x0 that is affine and diagonal."""
    basis = torch.stack([torch.zeros(3), torch.ones(3)]).double().view(2, 3, 1, 1)
    zero, one = sampler(basis).flatten(1).numpy()
    return one - zero, zero


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("count", COUNTS)
def test_ddim_is_the_closed_form_map(prediction, name, spacing, count):
    """Around its centre sqrt(abar) mu, a step t -> u scales the deviation from it, by what eps and x0 become:

    (sqrt(abar_t abar_u) s^2 + sqrt((1 - abar_t)(1 - abar_u))) / D_t.
    """
    bar = own_alpha_bar(name)
    levels = [bar[t] for t in own_timesteps(spacing, count)] + [1.0]
    slope = np.ones(3)
    for now, after in itertools.pairwise(levels):
        slope *= (np.sqrt(now * after) * S2 + np.sqrt((1 - now) * (1 - after))) / (now * S2 + 1 - now)
    offset = MU - slope * np.sqrt(levels[0]) * MU
    schedule, model = make_schedule(name), bayes_model(bar, prediction)
    got = affine_map(lambda x: ddim(model, x, schedule, count, spacing, prediction=prediction))
    np.testing.assert_allclose(got[0], slope, rtol=0, atol=1e-10)
    np.testing.assert_allclose(got[1], offset, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_with_unit_data_rotates_by_angles(prediction, to_one):
    """For s = 1 each step multiplies by cos(angle difference), cos(angle) = sqrt(abar)."""
    bar = own_alpha_bar("linear")
    levels = [bar[t] for t in own_timesteps("trailing", 13)] + [1.0 if to_one else bar[0]]
    angles = np.arccos(np.sqrt(levels))
    expected = np.prod(np.cos(np.diff(angles)))
    slope, offset = affine_map(
        lambda x: ddim(
            bayes_model(bar, prediction),
            x,
            LINEAR,
            13,
            "trailing",
            prediction=prediction,
            set_alpha_to_one=to_one,
        )
    )
    assert slope[1] == pytest.approx(expected, abs=1e-10)
    centre = math.sqrt(levels[-1]) * MU[1] - expected * math.sqrt(levels[0]) * MU[1]
    assert offset[1] == pytest.approx(centre, abs=1e-10)


def exact_start(bar, t, x):
    """x standard normal -> the true marginal of x_t, so that only discretisation error is left."""
    return math.sqrt(bar[t]) * per_channel(MU) + per_channel(bar[t] * S2 + 1 - bar[t]).sqrt() * x


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("name", "channels"), [("linear", [0, 1, 2]), ("cosine", [0, 1, 2]), ("scaled_linear", [1])])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_ddim_variance_error_is_first_order(prediction, name, channels, spacing):
    """Measured slopes -0.88..-0.97 for linear and cosine, s^2 = 0.04..1.

    scaled_linear starts at 1 - abar_0 = 8.5e-4, a first step no N refines: its narrow channels flatten to
    -0.67 (s^2 = 0.04) and -0.82 (0.25), so only s^2 = 1 (-0.90) is held to the band.
    """
    bar = own_alpha_bar(name)
    counts = [20, 40, 80, 160, 320, 640]
    schedule, model = make_schedule(name), bayes_model(bar, prediction)
    errors = []
    for count in counts:
        first = spaced_timesteps(1000, count, spacing)[-1]
        slope, _ = affine_map(
            lambda x, count=count, first=first: ddim(
                model, exact_start(bar, first, x), schedule, count, spacing, prediction=prediction
            )
        )
        errors.append(S2 - slope**2)
    errors = np.array(errors)
    assert (errors > 0).all()  # Deterministic DDIM always contracts too much on Gaussian data.
    for channel in channels:
        order = np.polyfit(np.log(counts), np.log(errors[:, channel]), 1)[0]
        assert -1.25 < order < -0.85


def noise_maps(sampler, steps):
    """Exact affine map of sampler(x_T, noise): (slope of x_T, offset, slope of each step's noise [steps-1, 3]).

    One run: sample 0 has zero input, sample 1 unit x_T, sample 2+i unit noise at step i alone.
    """
    x = torch.zeros(steps + 1, 3, 1, 1, dtype=torch.float64)
    x[1] = 1

    def noise(step):
        one = torch.zeros_like(x)
        one[2 + step] = 1
        return one

    out = sampler(x, noise).flatten(1).numpy()
    return out[1] - out[0], out[0], out[2:] - out[0]


def ancestral_maps(schedule, respacing, model, steps, **options):
    return noise_maps(lambda x, noise: ancestral(model, x, schedule, respacing, noise, **options), steps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_moments_with_noise_are_the_propagated_ones(prediction, name, eta):
    """A step t -> u keeps eta's share of the variance for new noise and scales the deviation by the rest:

    (sqrt(abar_t abar_u) s^2 + sqrt((1 - abar_u - g^2)(1 - abar_t))) / D_t, g^2 = eta^2 beta_tilde (Song 2021, eq. 16).
    """
    bar, count = own_alpha_bar(name), 40
    levels = [bar[t] for t in own_timesteps("trailing", count)] + [1.0]
    variance, slope = np.ones(3), np.ones(3)
    for now, after in itertools.pairwise(levels):
        added = eta**2 * (1 - after) / (1 - now) * (1 - now / after)
        scale = (np.sqrt(now * after) * S2 + np.sqrt((1 - after - added) * (1 - now))) / (now * S2 + 1 - now)
        variance, slope = scale**2 * variance + added, scale * slope
    schedule, model = make_schedule(name), bayes_model(bar, prediction)
    mine, offset, noises = noise_maps(
        lambda x, noise: ddim(model, x, schedule, count, "trailing", eta=eta, noise=noise, prediction=prediction), count
    )
    np.testing.assert_allclose(mine, slope, rtol=0, atol=1e-10)
    np.testing.assert_allclose(offset, MU - slope * np.sqrt(levels[0]) * MU, rtol=0, atol=1e-10)
    np.testing.assert_allclose(mine**2 + (noises**2).sum(0), variance, rtol=0, atol=1e-10)


def bayes_step(now, after):
    """q(x_u | x_t, x0) by precision weighting: coefficients of (x0, x_t), variance; and beta of the step."""
    keep = now / after
    if after == 1.0:
        return 1.0, 0.0, 0.0, 1 - keep
    precision = 1 / (1 - after) + keep / (1 - keep)
    return (
        math.sqrt(after) / (1 - after) / precision,
        math.sqrt(keep) / (1 - keep) / precision,
        1 / precision,
        1 - keep,
    )


def propagate(levels, variance_of):
    """(mean, variance) per channel after the last step of an ancestral run started from N(0, 1)."""
    mean, variance = np.zeros(3), np.ones(3)
    for now, after in itertools.pairwise(levels):
        from_x0, from_xt, small, large = bayes_step(now, after)
        gain = np.sqrt(now) * S2 / (now * S2 + 1 - now)
        slope = from_x0 * gain + from_xt
        mean = slope * mean + from_x0 * (MU - gain * np.sqrt(now) * MU)
        added = 0.0 if after == 1.0 else variance_of(small, large)
        variance = slope**2 * variance + added
    return mean, variance


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("respacing", ["1", "2", "10", "50", "ddim50"])
@pytest.mark.parametrize(
    ("options", "fraction", "variance_of"),
    [
        ({"variance": "fixed_small"}, None, lambda small, large: small),
        ({"variance": "fixed_large"}, None, lambda small, large: large),
        ({}, 0.2, lambda small, large: large**0.6 * small**0.4),  # v = 0.2: (v + 1)/2 = 0.6
    ],
    ids=["small", "large", "learned"],
)
def test_ancestral_moments_are_the_propagated_ones(prediction, name, respacing, options, fraction, variance_of):
    bar = own_alpha_bar(name)
    steps = iddpm_timesteps(1000, respacing)
    levels = [bar[t] for t in reversed(steps)] + [1.0]
    mean, variance = propagate(levels, variance_of)
    model = bayes_model(bar, prediction, None if fraction is None else lambda step: np.full(3, fraction))
    schedule = make_schedule(name)
    slope, offset, noises = ancestral_maps(schedule, respacing, model, len(steps), prediction=prediction, **options)
    np.testing.assert_allclose(offset, mean, rtol=0, atol=1e-10)
    np.testing.assert_allclose(slope**2 + (noises**2).sum(0), variance, rtol=0, atol=1e-10)


@pytest.mark.parametrize("respacing", ["2", "5", "10", "50", "250"])
def test_ancestral_with_the_true_variance_is_exact_for_any_number_of_steps(respacing):
    """Given the true reverse variance in the learned channels, every marginal is right, however few steps.

    Started at the true marginal, x before the last step has variance D_0 exactly; the last step adds no noise
    and leaves (sqrt(abar_0) s^2 / D_0)^2 D_0 and mean mu.
    """
    bar = own_alpha_bar("linear")
    steps = iddpm_timesteps(1000, respacing)
    before = {t: bar[steps[i - 1]] for i, t in enumerate(steps) if i}

    def fraction(step):
        if step not in before:
            return np.zeros(3)
        from_x0, _, small, large = bayes_step(bar[step], before[step])
        true = small + from_x0**2 * S2 * (1 - bar[step]) / (bar[step] * S2 + 1 - bar[step])
        return 2 * np.log(true / small) / np.log(large / small) - 1

    model = bayes_model(bar, fraction=fraction)
    slope, offset, noises = ancestral_maps(LINEAR, respacing, model, len(steps))
    last, first = bar[steps[0]], bar[steps[-1]]
    variance = slope**2 * (first * S2 + 1 - first) + (noises**2).sum(0)
    np.testing.assert_allclose(variance, last * S2**2 / (last * S2 + 1 - last), rtol=0, atol=1e-10)
    np.testing.assert_allclose(offset + slope * np.sqrt(first) * MU, MU, rtol=0, atol=1e-10)


def ancestral_variance(count, variance, name="linear", prediction="epsilon"):
    """(final variance from the true start, its limit): the last step's missing noise is no fault of N."""
    bar = own_alpha_bar(name)
    steps, model = iddpm_timesteps(1000, str(count)), bayes_model(bar, prediction)
    schedule = make_schedule(name)
    slope, _, noises = ancestral_maps(schedule, str(count), model, count, variance=variance, prediction=prediction)
    first, last = bar[steps[-1]], bar[steps[0]]
    final = slope**2 * (first * S2 + 1 - first) + (noises**2).sum(0)
    return final, last * S2**2 / (last * S2 + 1 - last)


@pytest.mark.parametrize(
    ("variance", "name", "prediction", "channels"),
    [
        ("fixed_large", "linear", "epsilon", [0, 2]),
        ("fixed_large", "scaled_linear", "v", [0, 2]),
        ("fixed_large", "cosine", "x0", [0, 2]),
        ("fixed_small", "linear", "epsilon", [1]),
        ("fixed_small", "scaled_linear", "x0", []),
        ("fixed_small", "cosine", "v", [0, 1]),
    ],
)
def test_ancestral_variance_error_is_first_order(variance, name, prediction, channels):
    """Measured slopes: large -1.00..-1.08; small -0.87, -0.85, -0.92 by schedule for s^2 = 1, cosine -0.87 for 0.25.

    The small variance is not yet asymptotic on narrow data, 40 to 60 % off at N = 20: -0.75..-0.81 (0.25), -0.60..-0.77
    (0.04). There, and for scaled_linear's -0.85, only the sign and the steepening towards first order are held.
    """
    counts = [20, 40, 80, 160, 320]
    pairs = [ancestral_variance(count, variance, name, prediction) for count in (*counts, 640)]
    errors = np.array([final - limit for final, limit in pairs])
    for channel in channels:
        order = np.polyfit(np.log([*counts, 640]), np.log(np.abs(errors[:, channel])), 1)[0]
        assert -1.25 < order < -0.85
    if variance == "fixed_small":
        assert (errors < 0).all()
        local = np.log2(errors[:4] / errors[1:5])
        assert (np.diff(local, axis=0) > 0).all()


@pytest.mark.parametrize("count", [2, 10, 100])
def test_beta_is_the_true_variance_of_unit_data(count):
    """Ho et al. 2020, section 3.2: sigma^2 = beta is optimal for x0 ~ N(0, I), hence exact at any N."""
    final, limit = ancestral_variance(count, "fixed_large")
    assert final[1] == pytest.approx(limit[1], abs=1e-10)
