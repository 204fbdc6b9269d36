"""Samplers against Gaussian data, where every step is an affine map known in closed form, and diffusers.

Data x0 ~ N(mu, diag(s^2)): x_t is N(sqrt(abar) mu, D) with D = abar s^2 + 1 - abar, and the best epsilon is
sqrt(1 - abar) (x_t - sqrt(abar) mu) / D. The tests keep their own alpha_bar (numpy, from the definition).
"""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from dsmoe.base.errors import ConfigError
from dsmoe.diffusion.objective import PREDICTIONS
from dsmoe.diffusion.samplers import ancestral, ddim
from dsmoe.diffusion.schedules import SPACINGS, iddpm_timesteps, make_schedule, spaced_timesteps

MU = np.array([0.7, -1.3, 0.0])
S2 = np.array([0.25, 1.0, 0.04])
LINEAR = make_schedule("linear")
COUNTS = [1, 2, 5, 10, 50, 250]


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


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("count", COUNTS)
def test_ddim_is_the_closed_form_map(name, spacing, count):
    """Around its centre sqrt(abar) mu, step t -> u scales by (sqrt(abar_t abar_u) s^2 + sqrt((1-abar_t)(1-abar_u))) / D_t."""
    bar = own_alpha_bar(name)
    levels = [bar[t] for t in own_timesteps(spacing, count)] + [1.0]
    slope = np.ones(3)
    for now, after in zip(levels, levels[1:], strict=False):
        slope *= (np.sqrt(now * after) * S2 + np.sqrt((1 - now) * (1 - after))) / (now * S2 + 1 - now)
    offset = MU - slope * np.sqrt(levels[0]) * MU
    got = affine_map(lambda x: ddim(bayes_model(bar), x, make_schedule(name), count, spacing))
    np.testing.assert_allclose(got[0], slope, rtol=0, atol=1e-10)
    np.testing.assert_allclose(got[1], offset, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_with_unit_data_rotates_by_angles(prediction, to_one):
    """For s = 1 each step multiplies by cos(angle difference), cos(angle) = sqrt(abar): a second closed form."""
    bar = own_alpha_bar("linear")
    levels = [bar[t] for t in own_timesteps("trailing", 13)] + [1.0 if to_one else bar[0]]
    angles = np.arccos(np.sqrt(levels))
    expected = np.prod(np.cos(np.diff(angles)))
    slope, offset = affine_map(
        lambda x: ddim(
            bayes_model(bar, prediction), x, LINEAR, 13, "trailing", prediction=prediction, set_alpha_to_one=to_one
        )
    )
    assert slope[1] == pytest.approx(expected, abs=1e-10)
    centre = math.sqrt(levels[-1]) * MU[1] - expected * math.sqrt(levels[0]) * MU[1]
    assert offset[1] == pytest.approx(centre, abs=1e-10)


def exact_start(bar, t, x):
    """x standard normal -> the true marginal of x_t, so that only discretisation error is left."""
    return math.sqrt(bar[t]) * per_channel(MU) + per_channel(bar[t] * S2 + 1 - bar[t]).sqrt() * x


@pytest.mark.parametrize(("name", "channels"), [("linear", [0, 1, 2]), ("cosine", [0, 1, 2]), ("scaled_linear", [1])])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_ddim_variance_error_is_first_order(name, channels, spacing):
    """Measured slopes -0.88..-0.97 (s^2 = 0.04..1). scaled_linear starts at 1 - abar_0 = 8.5e-4, a first step no N refines:

    its narrow channels flatten to -0.67 (s^2 = 0.04) and -0.82 (0.25), so only s^2 = 1 (-0.90) is held to the band.
    """
    bar = own_alpha_bar(name)
    counts = [20, 40, 80, 160, 320, 640]
    errors = []
    for count in counts:
        first = spaced_timesteps(1000, count, spacing)[-1]
        slope, _ = affine_map(
            lambda x, count=count, first=first: ddim(
                bayes_model(bar), exact_start(bar, first, x), make_schedule(name), count, spacing
            )
        )
        errors.append(S2 - slope**2)
    errors = np.array(errors)
    assert (errors > 0).all()  # Deterministic DDIM always contracts too much on Gaussian data.
    for channel in channels:
        order = np.polyfit(np.log(counts), np.log(errors[:, channel]), 1)[0]
        assert -1.25 < order < -0.85


def ancestral_maps(schedule, respacing, model, steps, **options):
    """Exact affine map of an ancestral run: (slope of x_T, offset, slopes of every step's noise [steps-1, 3]).

    One run: sample 0 has zero input, sample 1 unit x_T, sample 2+i unit noise at step i alone.
    """
    x = torch.zeros(steps + 1, 3, 1, 1, dtype=torch.float64)
    x[1] = 1

    def noise(step):
        one = torch.zeros_like(x)
        one[2 + step] = 1
        return one

    out = ancestral(model, x, schedule, respacing, noise, **options).flatten(1).numpy()
    return out[1] - out[0], out[0], out[2:] - out[0]


def bayes_step(now, after):
    """q(x_u | x_t) of the chain for a point x0, by precision weighting: coefficients of (x0, x_t), variance, beta."""
    keep = now / after
    if after == 1.0:
        return 1.0, 0.0, 0.0, 1 - keep
    precision = 1 / (1 - after) + keep / (1 - keep)
    return math.sqrt(after) / (1 - after) / precision, math.sqrt(keep) / (1 - keep) / precision, 1 / precision, 1 - keep


def propagate(levels, variance_of):
    """Moments of the ancestral sampler started from N(0, 1): (mean, variance) per channel after the last step."""
    mean, variance = np.zeros(3), np.ones(3)
    for now, after in zip(levels, levels[1:], strict=False):
        from_x0, from_xt, small, large = bayes_step(now, after)
        gain = np.sqrt(now) * S2 / (now * S2 + 1 - now)
        slope = from_x0 * gain + from_xt
        mean = slope * mean + from_x0 * (MU - gain * np.sqrt(now) * MU)
        added = 0.0 if after == 1.0 else variance_of(small, large)
        variance = slope**2 * variance + added
    return mean, variance


@pytest.mark.parametrize("respacing", ["1", "2", "5", "10", "50", "250", "ddim50"])
@pytest.mark.parametrize(
    ("options", "fraction", "variance_of"),
    [
        ({"variance": "fixed_small"}, None, lambda small, large: small),
        ({"variance": "fixed_large"}, None, lambda small, large: large),
        ({}, 0.2, lambda small, large: large**0.6 * small**0.4),  # v = 0.2: (v + 1)/2 = 0.6
    ],
    ids=["small", "large", "learned"],
)
def test_ancestral_moments_are_the_propagated_ones(respacing, options, fraction, variance_of):
    bar = own_alpha_bar("linear")
    steps = iddpm_timesteps(1000, respacing)
    levels = [bar[t] for t in reversed(steps)] + [1.0]
    mean, variance = propagate(levels, variance_of)
    model = bayes_model(bar, fraction=None if fraction is None else lambda step: np.full(3, fraction))
    slope, offset, noises = ancestral_maps(LINEAR, respacing, model, len(steps), **options)
    np.testing.assert_allclose(offset, mean, rtol=0, atol=1e-10)
    np.testing.assert_allclose(slope**2 + (noises**2).sum(0), variance, rtol=0, atol=1e-10)


@pytest.mark.parametrize("respacing", ["2", "5", "10", "50", "250"])
def test_ancestral_with_the_true_variance_is_exact_for_any_number_of_steps(respacing):
    """Given the true reverse variance in the learned channels, every marginal is right, however few the steps.

    Started at the true marginal, x before the last step has variance D_0 exactly; the last step, which adds no
    noise, leaves (sqrt(abar_0) s^2 / D_0)^2 D_0 and mean mu.
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


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_variance_error_is_first_order(variance):
    bar = own_alpha_bar("linear")
    counts = [20, 40, 80, 160, 320, 640]
    errors = []
    for count in counts:
        steps = iddpm_timesteps(1000, str(count))
        slope, _, noises = ancestral_maps(LINEAR, str(count), bayes_model(bar), count, variance=variance)
        first, last = bar[steps[-1]], bar[steps[0]]
        # The last step's missing noise is a floor of the schedule, not of N: compare with the exact limit.
        limit = last * S2**2 / (last * S2 + 1 - last)
        errors.append(np.abs(slope**2 * (first * S2 + 1 - first) + (noises**2).sum(0) - limit))
    for channel in range(3):
        order = np.polyfit(np.log(counts), np.log(np.array(errors)[:, channel]), 1)[0]
        assert -1.25 < order < -0.85


def wavy_model(channels_out):
    """A smooth nonlinear network of x and t, C or 2C channels out, variance channels in (-1, 1)."""

    def model(x, t):
        phase = t.to(x).view(-1, 1, 1, 1) / 100
        out = 0.9 * torch.tanh(x.roll(1, 1) + 0.3 * x + phase.sin())
        return out if channels_out == x.shape[1] else torch.cat([out, (x + phase).cos()], 1)

    return model


def start(dtype=torch.float32):
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("count", "spacing", "offset", "to_one", "eta", "clip", "prediction"),
    [
        (50, "leading", 0, True, 0.0, None, "epsilon"),  # what the DiT converter writes
        (10, "leading", 1, False, 0.0, None, "v"),  # stable-diffusion-2 folder
        (4, "trailing", 0, True, 0.0, None, "v"),  # Marigold v1.1
        (1, "trailing", 0, True, 0.0, None, "x0"),
        (20, "trailing", 0, True, 0.5, None, "epsilon"),
        (25, "leading", 1, False, 1.0, 1.0, "epsilon"),
        (10, "leading", 0, True, 0.0, 0.7, "v"),
    ],
)
def test_ddim_agrees_with_diffusers(count, spacing, offset, to_one, eta, clip, prediction):
    x = start()
    noise = torch.randn(count, *x.shape, generator=torch.Generator().manual_seed(1))
    other = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        set_alpha_to_one=to_one,
        steps_offset=offset,
        timestep_spacing=spacing,
        prediction_type={"v": "v_prediction", "x0": "sample"}.get(prediction, prediction),
    )
    other.set_timesteps(count)
    model, reference = wavy_model(4), x
    for i, t in enumerate(other.timesteps):
        output = model(reference, t.expand(2))
        drawn = noise[i] if eta else None
        reference = other.step(output, t, reference, eta=eta, variance_noise=drawn).prev_sample
    got = ddim(
        model,
        x,
        make_schedule("scaled_linear"),
        count,
        spacing,
        eta=eta,
        noise=lambda i: noise[i],
        prediction=prediction,
        steps_offset=offset,
        set_alpha_to_one=to_one,
        clip_sample=clip,
    )
    # diffusers' fp32 alpha_bar table is off by 1e-6 relative; x0 at the first step divides by sqrt(4.7e-3).
    torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("kind", ["learned_range", "fixed_small"])
def test_ancestral_agrees_with_diffusers_ddpm(spacing, kind):
    x, count = start(), 50
    noise = torch.randn(count, *x.shape, generator=torch.Generator().manual_seed(2))
    other = DDPMScheduler(
        beta_schedule="linear", variance_type=kind, clip_sample=False, timestep_spacing=spacing, steps_offset=0
    )
    other.set_timesteps(count)
    model, reference = wavy_model(8), x
    generator = torch.Generator().manual_seed(2)
    for t in other.timesteps:
        output = model(reference, t.expand(2))
        output = output if kind == "learned_range" else output[:, :4]
        reference = other.step(output, t, reference, generator=generator).prev_sample
    drawn = torch.stack([torch.randn(x.shape, generator=torch.Generator().manual_seed(2))])
    assert torch.equal(drawn[0], noise[0])  # the same stream, drawn step by step or at once
    got = ancestral(model, x, LINEAR, spaced_timesteps(1000, count, spacing), lambda i: noise[i], variance=kind)
    # fp32 tables with alpha_bar 4e-5 at the start: x0 estimates of size 160 carry 1e-5 relative error.
    torch.testing.assert_close(got, reference, rtol=1e-3, atol=1e-3)


def test_ddim_goes_to_the_next_entry_where_diffusers_jumps_elsewhere():
    """13 leading steps are 76 apart; 1000 // 13 = 76 agrees, but linspace's 83.25 does not: ours must telescope.

    For a network that knows the true noise, every step lands exactly on the trajectory a x0 + s noise.
    """
    x0, noise = start(torch.float64), start(torch.float64).flip(0)
    seen = []

    def model(x, t):
        level = LINEAR.alpha_bar[int(t[0])]
        torch.testing.assert_close(x, level.sqrt() * x0 + (1 - level).sqrt() * noise, rtol=0, atol=1e-10)
        seen.append(int(t[0]))
        return noise

    last = LINEAR.alpha_bar[999]
    got = ddim(model, last.sqrt() * x0 + (1 - last).sqrt() * noise, LINEAR, 13, "linspace")
    assert seen == [999, 916, 832, 749, 666, 583, 500, 416, 333, 250, 166, 83, 0]
    torch.testing.assert_close(got, x0, rtol=0, atol=1e-10)


def test_networks_are_told_original_steps_in_fp32_and_callbacks_count():
    told, calls = [], []

    def model(x, t):
        assert t.dtype == torch.float32
        assert x.dtype == torch.float32
        told.append(t.tolist())
        return torch.zeros(2, 8, 3, 3)

    asked = []

    def noise(step):
        asked.append(step)
        return torch.zeros(2, 4, 3, 3)

    out = ancestral(
        model, start(torch.bfloat16), LINEAR, "5", noise, callback=lambda i, n, x: calls.append((i, n, x.clone()))
    )
    assert told == [[float(t)] * 2 for t in (999, 749, 500, 250, 0)]  # 999 i / 4 = 249.75, 499.5, 749.25
    assert asked == [0, 1, 2, 3]
    assert [call[:2] for call in calls] == [(i, 5) for i in range(5)]
    assert torch.equal(calls[-1][2], out)


def test_eta_noise_is_asked_by_step_only_when_used():
    asked = []

    def noise(step):
        asked.append(step)
        return torch.zeros(2, 4, 3, 3)

    ddim(wavy_model(4), start(), LINEAR, 4, "trailing", eta=1.0, noise=noise)
    assert asked == [0, 1, 2]  # the last goes to alpha_bar 1 and adds none
    asked.clear()
    ddim(wavy_model(4), start(), LINEAR, 4, "trailing", eta=0.0, noise=noise)
    assert asked == []


def test_ddim_at_eta_one_is_ancestral_with_the_small_variance():
    """Song et al. 2021, section 4.1: eta = 1 is DDPM with beta_tilde, step for step."""
    x = start(torch.float64)
    noise = torch.randn(20, *x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    kept = spaced_timesteps(1000, 20, "trailing")
    one = ddim(wavy_model(4), x, LINEAR, 20, "trailing", eta=1.0, noise=lambda i: noise[i])
    two = ancestral(wavy_model(4), x, LINEAR, kept, lambda i: noise[i], variance="fixed_small")
    torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_bf16_network_output_is_upcast(sampler):
    noise = torch.randn(10, 2, 4, 3, 3, generator=torch.Generator().manual_seed(4))

    def run(model, x):
        if sampler == "ddim":
            return ddim(model, x, LINEAR, 10, "trailing")
        return ancestral(model, x, LINEAR, "10", lambda i: noise[i])

    inner = wavy_model(8)
    rounded = run(lambda x, t: inner(x, t).bfloat16(), start())
    widened = run(lambda x, t: inner(x, t).bfloat16().float(), start())
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, widened)


def test_variance_channels_do_not_matter_to_ddim():
    assert torch.equal(
        ddim(wavy_model(8), start(), LINEAR, 10, "leading"), ddim(wavy_model(4), start(), LINEAR, 10, "leading")
    )


def test_ancestral_clip_bounds_x0():
    """At the last step the sample is x0 itself, so the bound shows; unclipped it goes beyond."""
    quiet = torch.zeros(2, 4, 3, 3)
    free = ancestral(wavy_model(8), start(), LINEAR, "5", lambda i: quiet)
    bound = ancestral(wavy_model(8), start(), LINEAR, "5", lambda i: quiet, clip_x0=0.5)
    assert free.abs().max() > 0.5
    assert bound.abs().max().item() == 0.5


def test_mistakes_are_config_errors():
    x = start()
    with pytest.raises(ConfigError, match="no step noise"):
        ddim(wavy_model(4), x, LINEAR, 10, "leading", eta=0.5)
    with pytest.raises(ConfigError, match=r"0\.\.1"):
        ddim(wavy_model(4), x, LINEAR, 10, "leading", eta=1.5, noise=lambda i: x)
    with pytest.raises(ConfigError, match="epsilon"):
        ddim(wavy_model(4), x, LINEAR, 10, "leading", prediction="eps")
    with pytest.raises(ConfigError, match="learn_sigma"):
        ancestral(wavy_model(4), x, LINEAR, "10", lambda i: x)
    with pytest.raises(ConfigError, match="6 channels for a state of 4"):
        ddim(lambda x, t: torch.zeros(2, 6, 3, 3), x, LINEAR, 10, "leading")
