"""Guidance against a linear toy model whose every channel is known by hand."""

import pytest
import torch

from dsmoe.base.errors import ConfigError
from dsmoe.diffusion.guidance import classifier_free
from dsmoe.diffusion.samplers import ddim
from dsmoe.diffusion.schedules import make_schedule

NULL = 10


class Linear:
    """Output channel c of sample b: (c + 1) * x[b, c mod C] + 100 * t[b] + (c + 1) * y[b]."""

    def __init__(self, out_channels):
        self.out_channels = out_channels
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append((x, t, y))
        channel = torch.arange(self.out_channels, dtype=x.dtype)
        weight = (channel + 1).view(1, -1, 1, 1)
        base = x[:, (channel % x.shape[1]).long()]
        return weight * base + 100 * t.view(-1, 1, 1, 1) + weight * y.view(-1, 1, 1, 1)


def inputs(channels=4):
    x = torch.arange(2 * channels * 4, dtype=torch.float64).view(2, channels, 2, 2)
    return x, torch.tensor([7.0, 7.0]), torch.tensor([3, 5])


@pytest.mark.parametrize(("channels", "guided"), [(3, 3), (1, 1), (4, 4), ("all", 4), (9, 4)])
@pytest.mark.parametrize("out_channels", [4, 8])
def test_guided_channels_extrapolate_and_the_rest_is_conditional(channels, guided, out_channels):
    x, t, y = inputs()
    model = Linear(out_channels)
    scale = 1.5
    got = classifier_free(model, y, NULL, scale, channels)(x, t)
    conditional = Linear(out_channels)(x, t, y)
    # cond - uncond = (c + 1)(y - NULL), so guiding adds (scale - 1)(c + 1)(y - NULL) to cond.
    expected = conditional.clone()
    for c in range(guided):
        expected[:, c] += (scale - 1) * (c + 1) * (y - NULL).view(2, 1, 1)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    assert torch.equal(got[:, guided:], conditional[:, guided:])


def test_default_leaves_the_fourth_latent_channel_unguided():
    x, t, y = inputs()
    got = classifier_free(Linear(8), y, NULL, 4.0)(x, t)
    conditional = Linear(8)(x, t, y)
    assert (got[:, :3] != conditional[:, :3]).all()
    assert torch.equal(got[:, 3:], conditional[:, 3:])


def test_few_channels_never_guide_the_variance():
    x, t, y = inputs(channels=1)
    got = classifier_free(Linear(2), y, NULL, 4.0, channels=3)(x, t)
    conditional = Linear(2)(x, t, y)
    assert (got[:, 0] != conditional[:, 0]).all()
    assert torch.equal(got[:, 1], conditional[:, 1])


def test_model_sees_conditional_half_first_and_null_half_second():
    x, t, y = inputs()
    model = Linear(8)
    classifier_free(model, y, NULL, 2.0)(x, t)
    ((seen_x, seen_t, seen_y),) = model.calls
    assert seen_y.tolist() == [3, 5, NULL, NULL]
    assert seen_t.tolist() == [7.0] * 4
    assert torch.equal(seen_x, torch.cat([x, x]))


def test_scale_one_asks_once_and_undoubled_scale_zero_is_unconditional():
    x, t, y = inputs()
    model = Linear(8)
    got = classifier_free(model, y, NULL, 1.0)(x, t)
    assert [len(call[0]) for call in model.calls] == [2]
    assert torch.equal(got, Linear(8)(x, t, y))
    free = classifier_free(Linear(8), y, NULL, 0.0, "all")(x, t)
    torch.testing.assert_close(free[:, :4], Linear(8)(x, t, torch.full_like(y, NULL))[:, :4], rtol=1e-14, atol=0)


def test_bf16_model_is_combined_in_fp32():
    x, t, y = inputs()
    x = x.float() / 7

    def model(x, t, y):
        return Linear(8)(x, t, y).bfloat16()

    got = classifier_free(model, y, NULL, 3.0, "all")(x, t)
    both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, NULL)])).float()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[:, :4], both[2:, :4] + 3 * (both[:2, :4] - both[2:, :4]), rtol=1e-6, atol=0)
    assert classifier_free(model, y, NULL, 1.0)(x, t).dtype == torch.float32


def test_guided_model_drives_a_sampler():
    """A model that ignores x: one DDIM step from t = 999 to alpha_bar 1 gives (x - s guided)/a."""
    schedule = make_schedule("linear")
    x, _, y = inputs()

    def model(x, t, y):
        return (y.view(-1, 1, 1, 1) * torch.ones_like(x)).repeat(1, 2, 1, 1)

    got = ddim(classifier_free(model, y, NULL, 2.0), x, schedule, 1, "trailing")
    a = schedule.alpha_bar[999]
    for sample, label in enumerate((3.0, 5.0)):
        for channel in range(4):
            eps = NULL + 2.0 * (label - NULL) if channel < 3 else label
            expected = (x[sample, channel] - (1 - a).sqrt() * eps) / a.sqrt()
            torch.testing.assert_close(got[sample, channel], expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("channels", ["three", 0, -1, True, "3"])
def test_refuses_unknown_channels(channels):
    with pytest.raises(ConfigError, match="'all'"):
        classifier_free(Linear(8), torch.tensor([0]), NULL, 2.0, channels)
