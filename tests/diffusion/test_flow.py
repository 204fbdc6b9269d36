"""Rectified flow against its definition in plain numbers, and against the discrete objectives it sits beside."""

import numpy as np
import pytest
import torch

from dsmoe.base.errors import ConfigError
from dsmoe.diffusion.flow import RectifiedFlow
from dsmoe.diffusion.samplers import euler

FLOW = RectifiedFlow()
TIMES = torch.tensor([2.0**-24, 0.1, 0.5, 0.9, 1.0])


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def batch():
    return TIMES, draw(0, 5, 2, 3, 3), draw(1, 5, 2, 3, 3), draw(2, 5, 4, 3, 3)


def test_path_target_and_loss_are_the_definition_in_loops(batch):
    t, x0, noise, output = batch
    x_t = FLOW.corrupt(x0, t, noise)
    terms = FLOW.training_loss(output, x0, x_t, t, noise)
    for b in range(5):
        errors = []
        for index in np.ndindex(2, 3, 3):
            clean, eps, at = x0[b][index].item(), noise[b][index].item(), t[b].item()
            assert x_t[b][index].item() == pytest.approx((1 - at) * clean + at * eps, abs=1e-15)
            errors.append((output[b][index].item() - (eps - clean)) ** 2)
        assert terms.mse[b].item() == pytest.approx(np.mean(errors), rel=1e-13)
    assert torch.equal(terms.total, terms.mse)
    assert torch.equal(terms.vb, torch.zeros(5, dtype=torch.float64))


def test_second_half_of_the_output_has_no_part_in_the_loss(batch):
    """As DiT-MoE's published XL and G weights, whose learn_sigma half means nothing under rectified flow."""
    t, x0, noise, output = batch
    output.requires_grad_(True)
    wide = FLOW.training_loss(output, x0, x0, t, noise)
    narrow = FLOW.training_loss(output[:, :2], x0, x0, t, noise)
    assert torch.equal(wide.total, narrow.total)
    (slope,) = torch.autograd.grad(wide.total.sum(), output)
    assert (slope[:, :2] != 0).all()
    assert (slope[:, 2:] == 0).all()


def test_network_is_told_the_time_itself_in_fp32():
    told = FLOW.model_time(TIMES.double())
    assert told.dtype == torch.float32
    assert torch.equal(told, TIMES)


def test_true_velocity_denoises_to_x0_and_steps_along_the_path(batch):
    t, x0, noise, _ = batch
    x_t, velocity = FLOW.corrupt(x0, t, noise), FLOW.target(x0, t, noise)
    torch.testing.assert_close(FLOW.denoise(velocity, x_t, t), x0, rtol=0, atol=1e-15)
    earlier = t / 2
    moved = x_t - (t - earlier).double().view(-1, 1, 1, 1) * velocity
    torch.testing.assert_close(moved, FLOW.corrupt(x0, earlier, noise), rtol=0, atol=1e-15)


def test_low_precision_is_upcast_before_any_arithmetic(batch):
    t, x0, noise, output = batch
    x0, noise, output = x0.bfloat16(), noise.bfloat16(), output.bfloat16()
    x_t = FLOW.corrupt(x0, t, noise)
    assert x_t.dtype == torch.float32
    assert torch.equal(x_t, FLOW.corrupt(x0.float(), t, noise.float()))
    got = FLOW.training_loss(output, x0, x_t, t, noise)
    assert got.total.dtype == torch.float32
    assert torch.equal(got.total, FLOW.training_loss(output.float(), x0.float(), x_t, t, noise.float()).total)


def test_samples_do_not_touch_each_other(batch):
    t, x0, noise, output = batch
    whole = FLOW.training_loss(output, x0, x0, t, noise)
    for b in range(5):
        one = slice(b, b + 1)
        single = FLOW.training_loss(output[one], x0[one], x0[one], t[one], noise[one])
        torch.testing.assert_close(single.total, whole.total[one], rtol=1e-14, atol=0)


def test_a_wrong_number_of_channels_is_a_config_error(batch):
    t, x0, noise, output = batch
    with pytest.raises(ConfigError, match="3 channels for a state of 2"):
        FLOW.training_loss(output[:, :3], x0, x0, t, noise)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_other_codes_conventions_give_the_same_path_and_the_same_walk(scale):
    """SiT: with s = 1 - t the network sees x = s x0 + (1 - s) noise and predicts dx/ds = x0 - noise."""
    plain, other = RectifiedFlow(), RectifiedFlow(scale, "image")
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.25, 0.5, 1.0])
    torch.testing.assert_close(other.model_time(t), scale * torch.tensor([0.75, 0.5, 0.0]), rtol=0, atol=0)
    torch.testing.assert_close(RectifiedFlow(scale).model_time(t), scale * t, rtol=0, atol=0)
    assert torch.equal(other.corrupt(x0, t, noise), plain.corrupt(x0, t, noise))
    assert torch.equal(other.target(x0, t, noise), x0 - noise)
    x_t = other.corrupt(x0, t, noise)
    torch.testing.assert_close(other.denoise(x0 - noise, x_t, t), x0, rtol=0, atol=1e-12)
    assert other.training_loss(x0 - noise, x0, x_t, t, noise).total.abs().max() == 0

    def field(x, told):
        return (0.3 * x + told[:, None, None, None]).double()

    walked = euler(field, noise, plain, 7)
    mirrored = euler(lambda x, told: -field(x, 1 - told / scale), noise, other, 7)
    torch.testing.assert_close(mirrored, walked, rtol=0, atol=1e-6)
