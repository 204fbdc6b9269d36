"""Samplers against diffusers where the two agree by definition, and the rules of their calls.

Closed forms on Gaussian data: test_samplers_gaussian.
"""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from dsmoe.base.errors import ConfigError
from dsmoe.diffusion.samplers import ancestral, ddim
from dsmoe.diffusion.schedules import make_schedule, spaced_timesteps

LINEAR = make_schedule("linear")


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
    # diffusers' fp32 alpha_bar table is off by 1e-6 relative; measured 1.3e-6 of the largest value.
    torch.testing.assert_close(got, reference, rtol=0, atol=6.5e-6 * max(1.0, reference.abs().max().item()))


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("kind", ["learned_range", "fixed_small"])
def test_ancestral_agrees_with_diffusers_ddpm(spacing, kind):
    x, count = start(), 50
    other = DDPMScheduler(
        beta_schedule="linear",
        variance_type=kind,
        clip_sample=False,
        timestep_spacing=spacing,
        steps_offset=0,
    )
    other.set_timesteps(count)
    model, reference = wavy_model(8), x
    generator = torch.Generator().manual_seed(2)
    again = torch.Generator().manual_seed(2)
    for t in other.timesteps:
        output = model(reference, t.expand(2))
        output = output if kind == "learned_range" else output[:, :4]
        reference = other.step(output, t, reference, generator=generator).prev_sample
    # Step noise is asked in order, so the same stream serves both.
    got = ancestral(
        model,
        x,
        LINEAR,
        spaced_timesteps(1000, count, spacing),
        lambda i: torch.randn(x.shape, generator=again),
        variance=kind,
    )
    # diffusers' fp32 tables again; measured 5.4e-6 of the largest value (this toy network drives x to 700).
    torch.testing.assert_close(got, reference, rtol=0, atol=2.7e-5 * reference.abs().max().item())


def test_ddim_goes_to_the_next_entry_where_diffusers_jumps_elsewhere():
    """13 linspace steps are 83.25 apart, not 1000 // 13 = 76 as diffusers subtracts (contracts 6).

    For a network that knows the true noise, every step must land on the trajectory a x0 + s noise.
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
        model,
        start(torch.bfloat16),
        LINEAR,
        "5",
        noise,
        callback=lambda i, n, x: calls.append((i, n, x.clone())),
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
        ddim(wavy_model(8), start(), LINEAR, 10, "leading"),
        ddim(wavy_model(4), start(), LINEAR, 10, "leading"),
    )


def test_ancestral_clip_bounds_x0():
    """At the last step the sample is the x0 estimate itself, so one step shows the bound."""
    free = ancestral(wavy_model(8), start(), LINEAR, "1", lambda i: None)
    bound = ancestral(wavy_model(8), start(), LINEAR, "1", lambda i: None, clip_x0=0.5)
    assert free.abs().max() > 0.5
    assert torch.equal(bound, free.clamp(-0.5, 0.5))


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
