import numpy as np
import pytest
import torch
from scipy import stats

from dsmoe.base.diffusion import DiffusionSpec
from dsmoe.codec.protocol import Posterior
from dsmoe.tasks.class_conditional import ClassConditional
from dsmoe.tasks.noising import Noising

INDEX = torch.arange(20000) + 10**10


def _task(**changes: object) -> ClassConditional:
    return ClassConditional(
        **{"num_classes": 10, "label_dropout": 0.1, "seed": 3, "diffusion": DiffusionSpec(), **changes}
    )


def test_labels_are_dropped_to_the_null_class_at_the_stated_rate() -> None:
    y = INDEX % 10
    got = _task().labels(y, INDEX)
    dropped = got == 10
    assert _task().null_class == 10
    assert torch.equal(got[~dropped], y[~dropped])
    assert got.dtype == torch.int64
    assert stats.binomtest(int(dropped.sum()), len(y), 0.1).pvalue > 1e-6


@pytest.mark.parametrize(("rate", "dropped"), [(0.0, 0), (1.0, 20000)])
def test_dropout_limits(rate: float, dropped: int) -> None:
    got = _task(label_dropout=rate).labels(torch.zeros_like(INDEX), INDEX)
    assert (got == 10).sum() == dropped


def test_posterior_draw_is_mean_plus_std_times_its_own_noise() -> None:
    index = INDEX[:2000]
    mean = torch.full((2000, 2, 2, 2), 5.0)
    std = torch.full_like(mean, 0.25)
    z = ((_task().latents(Posterior(mean, std), index) - mean) / std).flatten().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-6
    noise = Noising(DiffusionSpec(), 3).noise(index, (2, 2, 2), index).flatten().numpy()
    # Independent draws: |correlation| of 16000 pairs is below 6 / sqrt(16000).
    assert abs(np.corrcoef(z, noise)[0, 1]) < 0.048
    still = _task().latents(Posterior(mean, torch.zeros_like(mean)), index)
    assert torch.equal(still, mean)


def _inputs(task: ClassConditional, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    mean = (index % 7).float()[:, None, None, None].expand(-1, 4, 2, 2).contiguous()
    got = task.training_inputs(Posterior(mean, torch.ones_like(mean)), index % 10, index)
    return got.x0, got.t, got.noise, got.y


def test_inputs_depend_on_the_index_alone() -> None:
    whole = _inputs(_task(), INDEX[:64])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    parts = [_inputs(_task(), part) for part in INDEX[:64][order].split(10)]
    for j, want in enumerate(whole):
        got = torch.cat([part[j] for part in parts])
        assert torch.equal(got, want[order])


def test_inputs_are_the_single_draws_put_together() -> None:
    index = INDEX[:32]
    x0, t, noise, y = _inputs(_task(), index)
    assert x0.shape == noise.shape == (32, 4, 2, 2)
    noising = Noising(DiffusionSpec(), 3)
    assert torch.equal(t, noising.times(index))
    assert torch.equal(noise, noising.noise(index, (4, 2, 2), t))
    assert torch.equal(y, _task().labels(index % 10, index))


def test_times_and_noise_are_those_of_the_recipe() -> None:
    spec = DiffusionSpec(prediction="velocity", schedule="rectified_flow", noise="multi_resolution")
    _, t, noise, _ = _inputs(_task(diffusion=spec), INDEX[:32])
    assert torch.equal(t, Noising(spec, 3).times(INDEX[:32]))
    assert torch.equal(noise, Noising(spec, 3).noise(INDEX[:32], (4, 2, 2), t))


def test_seeds_differ() -> None:
    for a, b in zip(_inputs(_task(), INDEX[:64]), _inputs(_task(seed=4), INDEX[:64]), strict=True):
        assert not torch.equal(a, b)


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    _inputs(_task(), INDEX[:8])
    assert torch.equal(before, torch.get_rng_state())
