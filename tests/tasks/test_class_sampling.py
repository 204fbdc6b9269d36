"""Drawing dispatches to the right sampler with the recipe's objective, guidance and each image's own noise."""

import pytest
import torch

from dsmoe.base.diffusion import DiffusionSpec
from dsmoe.data.transforms import to_uint8
from dsmoe.diffusion import make_objective
from dsmoe.diffusion.flow import RectifiedFlow
from dsmoe.diffusion.samplers import ancestral, ddim, euler
from dsmoe.diffusion.schedules import make_schedule
from dsmoe.ops import random
from dsmoe.tasks.class_sampling import Sampling, generate

NULL, STEPS, SIDE = 5, 4, 6
LABELS, NUMBERS = torch.tensor([0, 3, 1]), torch.tensor([10, 2**40, 7])


class FirstThree:
    """A codec of four latent channels that shows three of them, values up to 1e5 not yet black or white."""

    channels = 4

    def decode(self, latents):
        return torch.asinh(latents[:, :3]) / 12


def network(x, t, y):
    """(2C channels of x, t and the label in a wavy mixture, router statistics)."""
    phase = (t / 300 + y).view(-1, 1, 1, 1)
    out = 0.8 * torch.tanh(x.roll(1, 1) + phase.sin()) + 0.1 * phase.cos()
    return torch.cat([out, (x + phase).cos()], 1), "statistics"


def guided(scale, channels):
    """The same with guidance on the first channels, by the formula."""

    def model(x, t):
        with_label, without = network(x, t, LABELS)[0], network(x, t, torch.full_like(LABELS, NULL))[0]
        mixed = with_label.clone()
        mixed[:, :channels] = without[:, :channels] + scale * (with_label - without)[:, :channels]
        return mixed

    return model


def start():
    return random.normal(9, "sample_noise", NUMBERS, (4, SIDE, SIDE))


def step_noise(step):
    return random.normal(9, "sample_step", NUMBERS * 65536 + step, (4, SIDE, SIDE))


def draw(spec, sampling, labels=LABELS, numbers=NUMBERS, **more):
    objective, size = make_objective(spec), {"latent_side": SIDE, "null_class": NULL}
    return generate(network, FirstThree(), objective, labels, numbers, sampling, **size, **more)


def same(got, latents):
    """Equal images, but for values that rounding moves over the border of two grey levels."""
    expected = to_uint8(FirstThree().decode(latents))
    assert got.dtype == torch.uint8
    assert (got.int() - expected.int()).abs().max() <= 1
    assert (got == expected).float().mean() > 0.99
    assert ((expected > 0) & (expected < 255)).float().mean() > 0.9


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("channels", [3, "all"])
@pytest.mark.parametrize(("spacing", "eta"), [("trailing", 0.0), ("leading", 0.0), ("linspace", 1.0)])
def test_ddim_with_its_spacing_and_noise(prediction, channels, spacing, eta):
    spec = DiffusionSpec(prediction=prediction, schedule="cosine", timesteps=200)
    how = Sampling(sampler="ddim", steps=STEPS, spacing=spacing, eta=eta, guidance=1.5, cfg_channels=channels, seed=9)
    model = guided(1.5, 4 if channels == "all" else 3)
    schedule = make_schedule("cosine", 200)
    wanted = ddim(model, start(), schedule, STEPS, spacing, eta=eta, noise=step_noise, prediction=prediction)
    same(draw(spec, how), wanted)


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_ancestral_with_the_trained_variance(prediction, learn_sigma):
    spec = DiffusionSpec(prediction=prediction, schedule="scaled_linear", learn_sigma=learn_sigma)
    how = Sampling(sampler="ancestral", steps=STEPS, guidance=1.5, cfg_channels="all", seed=9)
    variance = "learned_range" if learn_sigma else "fixed_small"
    schedule = make_schedule("scaled_linear")
    model = guided(1.5, 4)
    wanted = ancestral(model, start(), schedule, str(STEPS), step_noise, prediction=prediction, variance=variance)
    same(draw(spec, how), wanted)


@pytest.mark.parametrize("channels", [3, "all"])
def test_euler_on_rectified_flow(channels):
    spec = DiffusionSpec(prediction="velocity", schedule="rectified_flow")
    how = Sampling(sampler="euler", steps=STEPS, guidance=1.5, cfg_channels=channels, seed=9)
    model = guided(1.5, 4 if channels == "all" else 3)
    same(draw(spec, how), euler(model, start(), RectifiedFlow(), STEPS))


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "euler"])
def test_an_image_does_not_depend_on_its_batch(sampler):
    flow = {"prediction": "velocity", "schedule": "rectified_flow"}
    spec = DiffusionSpec(**flow) if sampler == "euler" else DiffusionSpec()
    how = Sampling(sampler=sampler, steps=STEPS, guidance=1.5, eta=float(sampler == "ddim"), seed=9)
    sizes = []
    whole, single = draw(spec, how), draw(spec, how, batch_size=1, progress=sizes.append)
    assert sizes == [1, 1, 1]
    assert (whole.int() - single.int()).abs().max() <= 1
    back = draw(spec, how, labels=LABELS.flip(0), numbers=NUMBERS.flip(0)).flip(0)
    assert (whole.int() - back.int()).abs().max() <= 1
