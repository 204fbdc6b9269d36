"""The loss against a numpy loop, numerical integration and calculus; predictions against linear algebra."""

import math

import mpmath
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy import integrate, stats

from dsmoe.base.errors import ConfigError
from dsmoe.diffusion.objective import (
    PREDICTIONS,
    Objective,
    discretized_gaussian_nll,
    gaussian_kl,
    split_output,
)
from dsmoe.diffusion.schedules import make_schedule, respace

LINEAR = make_schedule("linear")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("m1", "s1", "m2", "s2"),
    [(0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -0.2, 0.9), (2.0, 0.1, 1.9, 0.05), (-1.0, 2.0, 3.0, 1.5)],
)
def test_kl_is_the_integral(m1, s1, m2, s2):
    def integrand(x):
        log_q = stats.norm.logpdf(x, m1, s1)
        return math.exp(log_q) * (log_q - stats.norm.logpdf(x, m2, s2))

    expected, _ = integrate.quad(integrand, m1 - 12 * s1, m1 + 12 * s1, points=[m1], epsabs=1e-12)
    got = gaussian_kl(tensor(m1), tensor(2 * math.log(s1)), tensor(m2), tensor(2 * math.log(s2)))
    assert got.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("sigma", [0.003, 0.01, 0.3, 2.0])
@pytest.mark.parametrize("shift", [0.0, 0.4, -2.0, 5.0])
@pytest.mark.parametrize("x", [-0.9, 0.0, 100 / 255])
def test_bin_mass_is_the_integral_of_the_density(x, shift, sigma):
    mean = x - shift * sigma
    mass, _ = integrate.quad(lambda z: stats.norm.pdf(z, mean, sigma), x - 1 / 255, x + 1 / 255, epsabs=0, epsrel=1e-12)
    got = discretized_gaussian_nll(tensor(x), tensor(mean), tensor(2 * math.log(sigma)))
    assert got.item() == pytest.approx(-math.log(mass), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("x", "low", "high"), [(-1.0, -np.inf, -254 / 255), (1.0, 254 / 255, np.inf)])
@pytest.mark.parametrize("mean", [-1.004, -0.99, 0.98, 1.01])
def test_outermost_bins_are_open(x, low, high, mean):
    sigma = 0.7
    mass, _ = integrate.quad(lambda z: stats.norm.pdf(z, mean, sigma), low, high, epsrel=1e-12)
    got = discretized_gaussian_nll(tensor(x), tensor(mean), tensor(2 * math.log(sigma)))
    assert got.item() == pytest.approx(-math.log(mass), rel=1e-9)


def test_bins_of_all_grey_levels_sum_to_one():
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, sigma in [(0.2, 0.01), (-1.3, 0.5), (0.9, 0.05)]:
        nll = discretized_gaussian_nll(x, torch.full_like(x, mean), torch.full_like(x, 2 * math.log(sigma)))
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_latents_outside_the_pixel_range_use_the_open_bins():
    # A latent of 2.5 counts as ">= 2.5 - 1/255", as the published loss does; only 0.999 decides.
    sigma = 0.5
    mass = stats.norm.sf(2.5 - 1 / 255, 2.0, sigma)
    got = discretized_gaussian_nll(tensor(2.5), tensor(2.0), tensor(2 * math.log(sigma)))
    assert got.item() == pytest.approx(-math.log(mass), rel=1e-10)


@pytest.mark.parametrize("x", [-3.0, -0.5, 0.5, 3.0])
def test_far_tails_are_exact_in_fp32_with_finite_gradients(x):
    # 40 to 400 standard deviations away: the mass is far below fp32 and even fp64 range.
    for sigma, far in [(0.01, 0.4), (0.01, 4.0)]:
        for sign in (-1, 1):
            mean = x + sign * far
            low = -mpmath.inf if x < -0.999 else mpmath.mpf(x) - mpmath.mpf(1) / 255
            high = mpmath.inf if x > 0.999 else mpmath.mpf(x) + mpmath.mpf(1) / 255
            # In the tail the survival function differs cleanly; mirror when the bin is left of the mean.
            a, b = ((v - mpmath.mpf(mean)) / mpmath.mpf(sigma) for v in (low, high))
            if b < 0 or (b + a < 0):
                a, b = -b, -a
            with mpmath.workdps(60):
                expected = float(-mpmath.log((mpmath.erfc(a / mpmath.sqrt(2)) - mpmath.erfc(b / mpmath.sqrt(2))) / 2))
            log_variance = torch.tensor([2 * math.log(sigma)], requires_grad=True)
            got = discretized_gaussian_nll(torch.tensor([x]), torch.tensor([mean]), log_variance)
            # fp32 input rounding: relative 6e-8 of x, mean over a distance >= 0.4, doubled by the square.
            assert got.item() == pytest.approx(expected, rel=3e-6, abs=1e-6)
            got.sum().backward()
            assert torch.isfinite(log_variance.grad).all()


def test_runaway_wide_variance_stays_finite_in_fp32():
    """sigma = 100 leaves a log-cdf gap of 6e-5: fp32 knows it to 1e-3. At e^20 it is gone."""
    got = discretized_gaussian_nll(torch.zeros(1), torch.zeros(1), torch.tensor([2 * math.log(100)]))
    assert got.item() == pytest.approx(-math.log(2 / 255 * stats.norm.pdf(0, 0, 100)), abs=5e-3)
    log_variance = torch.tensor([40.0], requires_grad=True)
    got = discretized_gaussian_nll(torch.zeros(1), torch.zeros(1), log_variance)
    got.sum().backward()
    assert torch.isfinite(got).all()
    assert torch.isfinite(log_variance.grad).all()


def numpy_loss(output, x0, noise, t, betas):
    """Contracts 2.1.10 in loops: per-sample (mse, vb bits), scalar by scalar."""
    bar = np.cumprod(1 - betas)
    mse, bits = [], []
    for b in range(len(t)):
        k = t[b]
        previous = bar[k - 1] if k else 1.0

        def tilde(k):
            return betas[k] * (1 - bar[k - 1]) / (1 - bar[k])

        small, large = tilde(max(k, 1)), betas[k]
        errors, terms = [], []
        channels = x0.shape[1]
        for index in np.ndindex(x0.shape[1:]):
            clean, eps = x0[b][index], noise[b][index]
            x_t = math.sqrt(bar[k]) * clean + math.sqrt(1 - bar[k]) * eps
            eps_hat, v = output[b][index], output[b][(index[0] + channels, *index[1:])]
            errors.append((eps - eps_hat) ** 2)
            sigma = math.exp(0.5 * ((v + 1) / 2 * math.log(large) + (1 - v) / 2 * math.log(small)))
            x0_hat = (x_t - math.sqrt(1 - bar[k]) * eps_hat) / math.sqrt(bar[k])
            if k == 0:
                low = -np.inf if clean < -0.999 else clean - 1 / 255
                high = np.inf if clean > 0.999 else clean + 1 / 255
                z = stats.norm(x0_hat, sigma)
                mass = z.cdf(high) - z.cdf(low) if x0_hat > clean else z.sf(low) - z.sf(high)
                terms.append(-math.log2(mass))
                continue
            # q(x_{t-1} | x_t, x0) by precisions: prior N(sqrt(bar') x0, 1 - bar'), likelihood of x_t.
            alpha = 1 - betas[k]
            precision = 1 / (1 - previous) + alpha / betas[k]

            def mean(origin, x_t=x_t, previous=previous, alpha=alpha, k=k, precision=precision):
                pull = math.sqrt(previous) * origin / (1 - previous) + math.sqrt(alpha) * x_t / betas[k]
                return pull / precision

            gap = mean(clean) - mean(x0_hat)
            kl = math.log(sigma) - 0.5 * math.log(1 / precision) + (1 / precision + gap**2) / (2 * sigma**2) - 0.5
            terms.append(kl / math.log(2))
        mse.append(np.mean(errors))
        bits.append(np.mean(terms))
    return np.array(mse), np.array(bits)


@pytest.fixture(scope="module")
def batch():
    t = torch.tensor([0, 0, 1, 2, 500, 999])
    x0 = draw(0, 6, 2, 3, 3) * 0.8
    x0[0, 0, 0] = tensor(-1.0, 0.9995, 0.0)
    noise = draw(1, 6, 2, 3, 3)
    output = torch.cat([noise + 0.3 * draw(2, 6, 2, 3, 3), 0.7 * draw(3, 6, 2, 3, 3)], 1)
    return t, x0, noise, output


def test_loss_is_the_contract_formula(batch):
    t, x0, noise, output = batch
    objective = Objective(LINEAR)
    x_t = objective.corrupt(x0, t, noise)
    terms = objective.training_loss(output, x0, x_t, t, noise)
    betas = np.linspace(1e-4, 0.02, 1000)
    mse, bits = numpy_loss(output.numpy(), x0.numpy(), noise.numpy(), t.tolist(), betas)
    np.testing.assert_allclose(terms.mse.numpy(), mse, rtol=1e-12)
    # The KL at t = 1, 2 subtracts means 1e-2 apart relative to 1 - alpha_bar = 1e-4: 12 digits are left.
    np.testing.assert_allclose(terms.vb.numpy(), bits, rtol=1e-8)
    np.testing.assert_allclose(terms.total.numpy(), mse + bits, rtol=1e-8)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_fp32_loss_keeps_its_digits(name):
    """Measured worst over every step and 3 seeds: 1.1e-5 of max(vb, 1e-2), cosine at t = 3; allowed 5x."""
    objective = Objective(make_schedule(name))
    t = torch.arange(1000)
    x0, noise = draw(4, len(t), 4, 4, 4), draw(5, len(t), 4, 4, 4)
    # The same fp32 numbers in both precisions, so that only the arithmetic differs.
    x0, noise = x0.float(), noise.float()
    output = torch.cat([noise + 0.1 * draw(6, *x0.shape).float(), 0.5 * draw(7, *x0.shape).float()], 1)
    x_t = objective.corrupt(x0, t, noise)
    single = objective.training_loss(output, x0, x_t, t, noise)
    double = objective.training_loss(
        output.double(), x0.double(), objective.corrupt(x0.double(), t, noise.double()), t, noise.double()
    )
    assert single.total.dtype == torch.float32
    error = (single.vb - double.vb).abs() / double.vb.clamp(min=1e-2)
    assert error.max().item() < 5.5e-5


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_vb_trains_the_variance_channels_alone(batch, prediction):
    t, x0, noise, output = batch
    objective = Objective(LINEAR, prediction)
    # A guess near the target of this prediction; far off, an open bin's mass is 1 and rightly has no slope.
    near = objective.target(x0, t, noise) + 0.01 * draw(2, *x0.shape)
    output = torch.cat([near, output[:, 2:]], 1).requires_grad_(True)
    terms = objective.training_loss(output, x0, objective.corrupt(x0, t, noise), t, noise)
    (of_vb,) = torch.autograd.grad(terms.vb.sum(), output, retain_graph=True)
    assert (of_vb[:, :2] == 0).all()
    assert (of_vb[:, 2:] != 0).all()
    (of_mse,) = torch.autograd.grad(terms.mse.sum(), output, retain_graph=True)
    assert (of_mse[:, 2:] == 0).all()
    expected = 2 * (output[:, :2] - objective.target(x0, t, noise)) / x0[0].numel()
    torch.testing.assert_close(of_mse[:, :2], expected.detach())


def test_vb_is_least_at_the_variance_that_calculus_gives():
    """d KL / d log sigma^2 = 0 exactly at sigma^2 = beta_tilde + (mean gap)^2."""
    t = torch.tensor([10, 300, 900])
    x0, noise, eps_hat = draw(8, 3, 1, 2, 2), draw(9, 3, 1, 2, 2), draw(10, 3, 1, 2, 2)
    bar = LINEAR.alpha_bar[t].view(3, 1, 1, 1)
    beta, previous = LINEAR.betas[t].view(3, 1, 1, 1), LINEAR.alpha_bar[t - 1].view(3, 1, 1, 1)
    tilde = beta * (1 - previous) / (1 - bar)
    gap = beta / ((1 - beta) * (1 - bar)).sqrt() * (noise - eps_hat)  # DDPM eq. 11: mean in terms of noise
    raw = (torch.log(tilde + gap**2) - tilde.log()) / (beta.log() - tilde.log()) * 2 - 1
    objective = Objective(LINEAR)
    for offset, sign in [(0.0, 0), (1e-3, 1), (-1e-3, -1)]:
        moved = (raw + offset).requires_grad_(True)
        output = torch.cat([eps_hat, moved], 1)
        vb = objective.training_loss(output, x0, objective.corrupt(x0, t, noise), t, noise).vb
        (slope,) = torch.autograd.grad(vb.sum(), moved)
        if sign:
            assert (slope.sign() == sign).all()
        else:
            assert slope.abs().max() < 1e-9


def test_variance_end_points():
    t = torch.tensor([0, 1, 700])
    x_t = torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    ones = torch.ones_like(x_t)
    learned = Objective(LINEAR)
    low, high, middle = (learned.log_variance(v, x_t, t).flatten() for v in (-ones, ones, 0 * ones))
    betas = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - betas)
    tilde = [betas[k] * (1 - bar[k - 1]) / (1 - bar[k]) for k in (1, 1, 700)]
    np.testing.assert_allclose(low.exp().numpy(), tilde, rtol=1e-10)
    np.testing.assert_allclose(high.exp().numpy(), betas[[0, 1, 700]], rtol=1e-12)
    np.testing.assert_allclose(middle.exp().numpy(), np.sqrt(tilde * betas[[0, 1, 700]]), rtol=1e-10)
    small = Objective(LINEAR, variance="fixed_small").log_variance(None, x_t, t).flatten()
    large = Objective(LINEAR, variance="fixed_large").log_variance(None, x_t, t).flatten()
    np.testing.assert_allclose(small.exp().numpy(), tilde, rtol=1e-10)
    np.testing.assert_allclose(large.exp().numpy(), [tilde[0], betas[1], betas[700]], rtol=1e-10)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_fixed_variance_is_plain_mse_and_ignores_an_idle_head(batch, variance):
    t, x0, noise, output = batch
    objective = Objective(LINEAR, variance=variance)
    x_t = objective.corrupt(x0, t, noise)
    expected = ((output[:, :2] - noise) ** 2).mean((1, 2, 3))
    for candidate in (output, output[:, :2]):
        terms = objective.training_loss(candidate, x0, x_t, t, noise)
        torch.testing.assert_close(terms.total, expected)
        assert (terms.vb == 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_true_target_denoises_to_x0(prediction, name):
    objective = Objective(make_schedule(name), prediction, "fixed_small")
    t = torch.tensor([0, 3, 400, 998, 999])
    x0, noise = draw(11, 5, 2, 3, 3), draw(12, 5, 2, 3, 3)
    x_t = objective.corrupt(x0, t, noise)
    got = objective.denoise(objective.target(x0, t, noise), x_t, t)
    # epsilon divides by sqrt(alpha_bar), 5e-5 for cosine: 1e-16 grows to 1e-11.
    torch.testing.assert_close(got, x0, rtol=0, atol=1e-10)


def test_corrupt_and_targets_agree_with_diffusers():
    other = DDPMScheduler(beta_schedule="linear")
    t = torch.tensor([0, 17, 500, 999])
    x0, noise = draw(13, 4, 4, 5, 5).float(), draw(14, 4, 4, 5, 5).float()
    # diffusers keeps fp32 tables made by a fp32 cumprod of 1000 factors: 1e-5 relative.
    torch.testing.assert_close(
        Objective(LINEAR).corrupt(x0, t, noise), other.add_noise(x0, noise, t), rtol=2e-5, atol=2e-5
    )
    torch.testing.assert_close(
        Objective(LINEAR, "v").target(x0, t, noise), other.get_velocity(x0, noise, t), rtol=2e-5, atol=2e-5
    )
    assert torch.equal(Objective(LINEAR, "x0").target(x0, t, noise), x0)
    assert torch.equal(Objective(LINEAR).target(x0, t, noise), noise)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_output_is_upcast_before_any_arithmetic(batch, low):
    t, x0, noise, output = batch
    x0, noise, output = x0.float(), noise.float(), output.to(low)
    objective = Objective(LINEAR)
    x_t = objective.corrupt(x0, t, noise)
    got = objective.training_loss(output, x0, x_t, t, noise)
    expected = objective.training_loss(output.float(), x0, x_t, t, noise)
    for mine, wanted in zip(got, expected, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, wanted)


def test_low_precision_latents_are_corrupted_in_fp32():
    x0, noise = draw(15, 2, 4, 3, 3).bfloat16(), draw(16, 2, 4, 3, 3).bfloat16()
    t = torch.tensor([5, 995])
    got = Objective(LINEAR).corrupt(x0, t, noise)
    assert got.dtype == torch.float32
    assert torch.equal(got, Objective(LINEAR).corrupt(x0.float(), t, noise.float()))


def test_samples_do_not_touch_each_other(batch):
    """Per-sample terms: one by one gives the batch's numbers, so any micro-batch does."""
    t, x0, noise, output = batch
    objective = Objective(LINEAR)
    x_t = objective.corrupt(x0, t, noise)
    whole = objective.training_loss(output, x0, x_t, t, noise)
    for b in range(len(t)):
        one = slice(b, b + 1)
        single = objective.training_loss(output[one], x0[one], x_t[one], t[one], noise[one])
        torch.testing.assert_close(single.total, whole.total[one], rtol=1e-14, atol=0)


def test_one_bad_sample_does_not_poison_gradients_of_others():
    """A head gone wild at t > 0 stays finite, and the discarded t = 0 branch adds no NaN."""
    t = torch.tensor([0, 999, 1])
    x0, noise = draw(17, 3, 1, 2, 2).float(), draw(18, 3, 1, 2, 2).float()
    output = torch.cat([noise * torch.tensor([1.0, 1e4, 1e4]).view(3, 1, 1, 1), torch.full_like(noise, 3.0)], 1)
    output.requires_grad_(True)
    objective = Objective(make_schedule("cosine"))
    terms = objective.training_loss(output, x0, objective.corrupt(x0, t, noise), t, noise)
    terms.total.sum().backward()
    assert torch.isfinite(terms.total).all()
    assert torch.isfinite(output.grad).all()


def test_network_is_told_original_steps():
    objective = Objective(respace(LINEAR, [3, 500, 999]))
    told = objective.model_time(torch.tensor([2, 0, 1]))
    assert told.tolist() == [999.0, 3.0, 500.0]
    assert told.dtype == torch.float32


def test_mistakes_are_config_errors(batch):
    t, x0, noise, output = batch
    with pytest.raises(ConfigError, match="Did you mean 'epsilon'"):
        Objective(LINEAR, "epsilom")
    with pytest.raises(ConfigError, match="fixed_small"):
        Objective(LINEAR, variance="learned")
    with pytest.raises(ConfigError, match="learn_sigma"):
        Objective(LINEAR).training_loss(output[:, :2], x0, x0, t, noise)
    with pytest.raises(ConfigError, match="3 channels for a state of 2"):
        split_output(output[:, :3], 2)
