"""Schedules against closed forms, brute-force Gaussian conditioning, exact fractions and diffusers."""

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from dsmoe.base.errors import ConfigError
from dsmoe.diffusion.schedules import (
    SCHEDULES,
    SPACINGS,
    gather,
    iddpm_timesteps,
    make_schedule,
    respace,
    spaced_timesteps,
)


def closed_form_betas(name, total):
    """The definition of each schedule, one step at a time in plain Python floats."""
    out = []
    for i in range(total):
        u = i / (total - 1)
        if name == "linear":
            out.append((1e-4 + u * (0.02 - 1e-4)) * 1000 / total)
        elif name == "scaled_linear":
            out.append((0.00085**0.5 + u * (0.012**0.5 - 0.00085**0.5)) ** 2)
        else:

            def level(step):
                return math.cos((step / total + 0.008) / 1.008 * math.pi / 2) ** 2

            out.append(min(1 - level(i + 1) / level(i), 0.999))
    return out


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total", [1000, 250])
def test_betas_and_alpha_bar_follow_the_definition(name, total):
    schedule = make_schedule(name, total)
    betas = closed_form_betas(name, total)
    # Betas reach down to 4e-5 as 1 - ratio: 1e-16 / 4e-5 leaves 12 digits.
    np.testing.assert_allclose(schedule.betas.numpy(), betas, rtol=1e-10)
    for t in (0, 1, total // 2, total - 1):
        exact = math.exp(math.fsum(math.log1p(-b) for b in betas[: t + 1]))
        assert schedule.alpha_bar[t].item() == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize(
    ("name", "stated", "digit"),
    [("linear", 4.0e-5, 0.05e-5), ("scaled_linear", 4.66e-3, 0.005e-3), ("cosine", 2.4e-9, 0.05e-9)],
)
def test_last_alpha_bar_is_the_contract_figure(name, stated, digit):
    assert abs(make_schedule(name).alpha_bar[999].item() - stated) <= digit


def test_cosine_alpha_bar_is_the_squared_cosine_until_the_cap():
    schedule = make_schedule("cosine")
    t = np.arange(999)
    level = np.cos(((t + 1) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(
        schedule.alpha_bar[:999].numpy(), level / np.cos(0.008 / 1.008 * np.pi / 2) ** 2, rtol=1e-9
    )
    assert schedule.betas[999].item() == 0.999
    assert (schedule.betas[:999] < 0.999).all()


def chain_posterior(betas, t):
    """(x0 coefficient, x_t coefficient, variance) of q(x_{t-1} | x_t, x0), from the forward chain itself.

    The chain x_k = sqrt(1-b_k) x_{k-1} + sqrt(b_k) e_k is written as a matrix over (x0, e_0..e_t); the pair
    (x_{t-1}, x_t) given x0 is then jointly Gaussian and is conditioned by the textbook formula.
    """
    row = np.zeros(len(betas) + 1)
    row[0] = 1.0
    rows = [row]
    for k, beta in enumerate(betas[: t + 1]):
        row = np.sqrt(1 - beta) * rows[-1]
        row[k + 1] += np.sqrt(beta)
        rows.append(row)
    previous, current = rows[t], rows[t + 1]
    gain = previous[1:] @ current[1:] / (current[1:] @ current[1:])
    variance = previous[1:] @ previous[1:] - gain * (current[1:] @ previous[1:])
    return previous[0] - gain * current[0], gain, variance


@pytest.mark.parametrize(
    "schedule",
    [
        make_schedule("linear", 40),
        make_schedule("scaled_linear", 40),
        make_schedule("cosine", 40),
        respace(make_schedule("linear"), iddpm_timesteps(1000, "25")),
    ],
    ids=["linear", "scaled_linear", "cosine", "respaced"],
)
def test_posterior_is_gaussian_conditioning_of_the_chain(schedule):
    betas = schedule.betas.numpy()
    for t in range(len(schedule)):
        x0, xt, variance = chain_posterior(betas, t)
        assert schedule.posterior_x0[t].item() == pytest.approx(x0, abs=1e-11)
        assert schedule.posterior_xt[t].item() == pytest.approx(xt, abs=1e-11)
        assert schedule.posterior_variance[t].item() == pytest.approx(variance, abs=1e-12)


def test_first_posterior_is_a_point_and_its_log_variance_is_the_second_ones():
    schedule = make_schedule("linear")
    assert schedule.posterior_variance[0].item() == 0
    # beta_1 (1 - abar_0) / (1 - abar_1) by hand: b0 = 1e-4, b1 = 1e-4 + 0.0199/999.
    b0, b1 = 1e-4, 1e-4 + 0.0199 / 999
    tilde = b1 * b0 / (b0 + b1 - b0 * b1)
    for t in (0, 1):
        assert schedule.log_posterior_variance[t].item() == pytest.approx(math.log(tilde), abs=1e-10)
    torch.testing.assert_close(schedule.log_posterior_variance[1:].exp(), schedule.posterior_variance[1:])


def test_one_step_schedule_is_finite():
    schedule = respace(make_schedule("linear"), [999])
    assert schedule.betas.item() == pytest.approx(1 - make_schedule("linear").alpha_bar[999].item(), abs=1e-15)
    for field in dataclasses.fields(schedule):
        value = getattr(schedule, field.name)
        assert not isinstance(value, torch.Tensor) or bool(torch.isfinite(value).all()), field.name


def test_respacing_keeps_alpha_bar_and_composes_maps():
    full = make_schedule("cosine")
    half = respace(full, range(1, 1000, 2))
    again = respace(half, [0, 7, 499])
    assert again.timestep_map.tolist() == [1, 15, 999]
    assert torch.equal(again.alpha_bar, full.alpha_bar[[1, 15, 999]])
    # The strides of the respaced chain multiply up to what the full chain's do.
    torch.testing.assert_close(again.betas[1], 1 - (1 - full.betas[2:16]).prod(), rtol=1e-12, atol=0)
    # Identity respacing changes nothing but rounding of 1 - ratio (1e-16 over the smallest beta, 4e-5).
    same = respace(full, range(1000))
    torch.testing.assert_close(same.betas, full.betas, rtol=1e-10, atol=0)


@pytest.mark.parametrize("steps", [[], [3, 3], [5, 2], [-1, 4], [0, 1000]])
def test_respacing_refuses_bad_steps(steps):
    with pytest.raises(ConfigError, match="strictly increasing"):
        respace(make_schedule("linear"), steps)


def test_to_moves_every_table_and_keeps_bits():
    schedule = make_schedule("linear")
    moved, same = schedule.to("meta"), schedule.to("cpu")
    for field in dataclasses.fields(schedule):
        value = getattr(schedule, field.name)
        if isinstance(value, torch.Tensor):
            assert getattr(moved, field.name).device.type == "meta"
            assert torch.equal(getattr(same, field.name), value)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_gather_takes_the_entry_in_work_precision(dtype, result):
    schedule = make_schedule("linear")
    got = gather(schedule.alpha_bar, torch.tensor([0, 999]), torch.zeros(2, 4, 2, 2, dtype=dtype))
    assert got.dtype == result
    assert got.shape == (2, 1, 1, 1)
    assert got[0].item() == pytest.approx(0.9999, rel=1e-7 if result == torch.float32 else 1e-15)
    assert got[1].item() == pytest.approx(4.0358297653756754e-05, rel=1e-7)


def test_iddpm_250_by_hand_and_by_exact_fractions():
    steps = iddpm_timesteps(1000, "250")
    assert steps[:4] == (0, 4, 8, 12)  # 4.012, 8.024, 12.036
    assert steps[62] == 249  # 248.747
    assert steps[124:126] == (497, 502)  # 497.494, 501.506
    assert steps[-2:] == (995, 999)  # 994.988
    assert steps == tuple(round(Fraction(999 * i, 249)) for i in range(250))
    assert iddpm_timesteps(1000, "50") == tuple(round(Fraction(999 * i, 49)) for i in range(50))


def test_iddpm_sections_and_strides():
    assert iddpm_timesteps(1000, "1000") == tuple(range(1000))
    assert iddpm_timesteps(1000, "1") == (0,)
    # Sections of 4, 3, 3 out of 10 (the remainder goes to the first): ends are kept within each section.
    assert iddpm_timesteps(10, "2,1,3") == (0, 3, 4, 7, 8, 9)
    assert iddpm_timesteps(300, "10,15,20")[:10] == tuple(range(0, 100, 11))
    assert iddpm_timesteps(1000, "ddim50") == tuple(range(0, 1000, 20))
    assert iddpm_timesteps(1000, "ddim334") == tuple(range(0, 1000, 3))


@pytest.mark.parametrize("text", ["", "ddim", "ddim0", "ddim333", "fast", "0", "-5", "2.5", "10,", "1001", "999,2"])
def test_iddpm_refuses(text):
    with pytest.raises(ConfigError, match="respacing"):
        iddpm_timesteps(1000, text)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_agree_with_diffusers_where_no_half_is_rounded(spacing):
    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=0)
    compared = 0
    for steps in (*range(1, 60), 100, 125, 200, 250, 333, 500, 999, 1000):
        exact = {
            "leading": [Fraction(0)] * steps,
            "trailing": [Fraction(1000 * i, steps) for i in range(steps)],
            "linspace": [Fraction(999 * i, max(steps - 1, 1)) for i in range(steps)],
        }[spacing]
        if any(value.denominator == 2 for value in exact):
            continue
        scheduler.set_timesteps(steps)
        assert spaced_timesteps(1000, steps, spacing) == tuple(reversed(scheduler.timesteps.tolist())), steps
        compared += 1
    assert compared >= 30  # the rest round a half somewhere


def test_spacings_by_hand():
    assert spaced_timesteps(1000, 4, "leading") == (0, 250, 500, 750)
    assert spaced_timesteps(1000, 4, "leading", 1) == (1, 251, 501, 751)
    assert spaced_timesteps(1000, 4, "trailing") == (249, 499, 749, 999)
    assert spaced_timesteps(1000, 4, "linspace") == (0, 333, 666, 999)
    assert spaced_timesteps(1000, 1, "trailing") == (999,)
    assert spaced_timesteps(1000, 7, "leading") == tuple(142 * i for i in range(7))
    assert spaced_timesteps(1000, 3, "trailing") == (332, 666, 999)  # 1000/3 = 333.3, 666.7, 1000, minus 1
    # diffusers gives 62 entries for 61 trailing steps, the extra one -1; ours has what was asked for.
    assert len(spaced_timesteps(1000, 61, "trailing")) == 61
    assert spaced_timesteps(1000, 61, "trailing")[0] >= 0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_count_gives_that_many_increasing_steps(spacing):
    for steps in range(1, 1001):
        chosen = spaced_timesteps(1000, steps, spacing)
        assert len(chosen) == steps
        assert chosen[0] >= 0
        assert chosen[-1] <= 999
        assert all(a < b for a, b in itertools.pairwise(chosen)), steps


@pytest.mark.parametrize(
    ("steps", "spacing", "offset", "words"),
    [
        (50, "leeding", 0, "leading"),
        (0, "leading", 0, "1..1000"),
        (1001, "trailing", 0, "1..1000"),
        (1000, "leading", 1, "0..999"),
        (50, "trailing", 1, "only 'leading'"),
    ],
)
def test_spacing_refuses(steps, spacing, offset, words):
    with pytest.raises(ConfigError, match=words):
        spaced_timesteps(1000, steps, spacing, offset)


def test_make_schedule_refuses():
    with pytest.raises(ConfigError, match="Did you mean 'cosine'"):
        make_schedule("cosin")
    with pytest.raises(ConfigError, match="more timesteps"):
        make_schedule("linear", 20)  # last beta would be exactly 1
    with pytest.raises(ConfigError, match="at least 1"):
        make_schedule("cosine", 0)
