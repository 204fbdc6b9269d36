"""Every objective that a recipe can name: its optimum, and that they are one another in disguise."""

import itertools

import numpy as np
import pytest
import torch

from dsmoe.base import diffusion as names
from dsmoe.base.diffusion import DiffusionSpec
from dsmoe.base.errors import ConfigError
from dsmoe.diffusion import make_objective
from dsmoe.diffusion.flow import RectifiedFlow
from dsmoe.diffusion.objective import PREDICTIONS
from dsmoe.diffusion.samplers import ancestral, ddim
from dsmoe.diffusion.schedules import SCHEDULES

DISCRETE = list(itertools.product(PREDICTIONS, SCHEDULES))
EVERY = [*DISCRETE, ("velocity", "rectified_flow")]


def objective_of(prediction, schedule, **more):
    return make_objective(DiffusionSpec(prediction=prediction, schedule=schedule, **more))


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_recipes_name_what_there_is():
    assert set(PREDICTIONS) | {"velocity"} == set(names.PREDICTIONS)
    assert set(SCHEDULES) == set(names.BETA_SCHEDULES)


@pytest.mark.parametrize(("prediction", "schedule"), DISCRETE)
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_recipe_gets_its_objective(prediction, schedule, learn_sigma):
    objective = objective_of(prediction, schedule, learn_sigma=learn_sigma, timesteps=500)
    assert (objective.prediction, objective.schedule.name, len(objective.schedule)) == (prediction, schedule, 500)
    assert objective.variance == ("learned_range" if learn_sigma else "fixed_small")


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_rectified_flow_is_the_flow_with_or_without_a_second_half(learn_sigma):
    assert objective_of("velocity", "rectified_flow", learn_sigma=learn_sigma) == RectifiedFlow()


def test_too_few_timesteps_for_the_betas_are_refused():
    with pytest.raises(ConfigError, match="use more timesteps"):
        objective_of("epsilon", "linear", timesteps=10)


# --- the optimum ---

MU, S = 0.7, 0.4
# Four points (x0, noise) with the first and second moments of N(MU, S^2) x N(0, 1): a quadratic loss sees no more.
POINTS = torch.tensor([[MU + i * S, float(j)] for i in (-1, 1) for j in (-1, 1)], dtype=torch.float64)


def path(schedule, t):
    """(a, s) of x_t = a x0 + s noise, from the definitions."""
    if schedule == "rectified_flow":
        return 1 - t, t
    if schedule == "linear":
        betas = np.linspace(1e-4, 0.02, 1000)
    elif schedule == "scaled_linear":
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    else:
        level = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - level[1:] / level[:-1], 0.999)
    bar = np.cumprod(1 - betas)[t]
    return bar**0.5, (1 - bar) ** 0.5


@pytest.mark.parametrize(("prediction", "schedule"), EVERY)
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_the_least_loss_is_at_the_conditional_expectation(prediction, schedule, place):
    """For Gaussian data E[target | x_t] is linear in x_t: there the gradient of the expected loss is zero."""
    t = [0.01, 0.3, 0.8, 1.0][place] if schedule == "rectified_flow" else [1, 200, 700, 999][place]
    a, s = path(schedule, t)
    c, d = {"epsilon": (0, 1), "x0": (1, 0), "v": (-s, a), "velocity": (-1, 1)}[prediction]
    slope = (a * c * S**2 + s * d) / (a**2 * S**2 + s**2)
    weights = torch.tensor([slope, c * MU - slope * a * MU], dtype=torch.float64, requires_grad=True)
    objective = objective_of(prediction, schedule, learn_sigma=False)
    x0, noise = (POINTS[:, i].view(4, 1, 1, 1) for i in (0, 1))
    times = torch.full((4,), t, dtype=torch.float64 if schedule == "rectified_flow" else torch.int64)
    x_t = objective.corrupt(x0, times, noise)

    def loss(of):
        return objective.training_loss(of[0] * x_t + of[1], x0, x_t, times, noise).total.mean()

    (gradient,) = torch.autograd.grad(loss(weights), weights)
    assert gradient.abs().max() < 1e-12
    for step in ([1e-3, 0.0], [-1e-3, 0.0], [0.0, 1e-3], [0.0, -1e-3]):
        assert loss(weights + torch.tensor(step)) > loss(weights)
    # What is left is the variance of the target given x_t.
    left = c**2 * S**2 + d**2 - slope * (a * c * S**2 + s * d)
    assert loss(weights).item() == pytest.approx(left, rel=1e-9, abs=1e-12)


# --- one network in another's terms ---


def translate(objective, other, output, x_t, t):
    """What a network of `other` would have said where one of `objective` said output."""
    x0 = objective.denoise(output, x_t, t)
    signal, sigma = (table[t].view(-1, 1, 1, 1) for table in (objective.schedule.signal, objective.schedule.sigma))
    return other.target(x0, t, (x_t - signal * x0) / sigma)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("one", "two"), list(itertools.permutations(PREDICTIONS, 2)))
def test_predictions_are_one_another_in_disguise(schedule, one, two):
    """A translated answer means the same x0 and reverse step; its error in x0 is weighted by 1, a^2/s^2 or 1/s^2."""
    first, second = (objective_of(p, schedule, learn_sigma=False) for p in (one, two))
    t = torch.tensor([3, 120, 500, 900])
    x0, noise, output = draw(0, 4, 2, 3, 3), draw(1, 4, 2, 3, 3), draw(2, 4, 2, 3, 3)
    x_t = first.corrupt(x0, t, noise)
    assert torch.equal(x_t, second.corrupt(x0, t, noise))
    same = translate(first, second, output, x_t, t)
    # Dividing by a or s, 1e-2 at the ends, loses two digits twice over.
    torch.testing.assert_close(second.denoise(same, x_t, t), first.denoise(output, x_t, t), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        second.reverse(same, x_t, t).mean, first.reverse(output, x_t, t).mean, rtol=1e-10, atol=1e-10
    )
    a2 = first.schedule.alpha_bar[t]
    weight = {"x0": torch.ones_like(a2), "epsilon": a2 / (1 - a2), "v": 1 / (1 - a2)}
    losses = [
        objective.training_loss(said, x0, x_t, t, noise).mse for objective, said in ((first, output), (second, same))
    ]
    torch.testing.assert_close(losses[0] / weight[one], losses[1] / weight[two], rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_samplers_walk_the_same_way_whatever_is_predicted(schedule, prediction):
    plain, other = objective_of("epsilon", schedule), objective_of(prediction, schedule)
    x_T, noise = draw(3, 2, 2, 3, 3), draw(4, 10, 2, 2, 3, 3)

    def epsilon(x, t):
        return torch.cat([torch.tanh(x.roll(1, 1)) + t.double().view(-1, 1, 1, 1) / 1000, x.cos()], 1)

    def translated(x, t):
        said = epsilon(x, t)
        return torch.cat([translate(plain, other, said[:, :2], x, t.long()), said[:, 2:]], 1)

    for objective, model in ((plain, epsilon), (other, translated)):
        kind = {"prediction": objective.prediction}
        ends = [
            ddim(model, x_T, objective.schedule, 10, "trailing", eta=0.5, noise=lambda i: noise[i], **kind),
            ancestral(model, x_T, objective.schedule, "10", lambda i: noise[i], **kind),
        ]
        if objective is plain:
            expected = ends
    for got, wanted in zip(ends, expected, strict=True):
        # The first step of cosine divides by sqrt(alpha_bar) = 5e-5: values near 1e4, 12 digits of which agree.
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())
