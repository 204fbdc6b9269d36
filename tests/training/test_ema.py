"""The moving averages against their closed form; sharding is shown by tests/training/test_layouts.py."""

import pytest
import torch

from dsmoe.training.ema import Ema
from dsmoe.training.engine import Fragment

DECAYS = {"ema": 0.9, "ema_0.5": 0.5}


class _Engine:
    """Weights of two parameters, the second owned in part, that a step changes in place or moves elsewhere."""

    def __init__(self):
        self.weights = [torch.tensor([1.0, -2.0]), torch.tensor([4.0])]
        self.stepped = True

    def step(self, generator, moves):
        for i, weight in enumerate(self.weights):
            update = torch.randn(weight.shape, generator=generator)
            self.weights[i] = weight + update if moves else weight.add_(update)

    def master_place(self):
        return tuple(weight.data_ptr() for weight in self.weights)

    def fragments(self):
        one, two = self.weights
        return [Fragment("one", (2,), 0, one), Fragment("two", (3,), 1, two)]


@pytest.mark.parametrize("moves", [False, True])
def test_every_average_is_the_geometric_sum_of_the_weights_it_saw(moves):
    engine = _Engine()
    seen = [torch.cat(engine.weights).double()]
    ema = Ema(engine, DECAYS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        engine.step(generator, moves)
        seen.append(torch.cat(engine.weights).double())
        ema.update()
    for name, decay in DECAYS.items():
        n = len(seen) - 1
        truth = decay**n * seen[0] + sum((1 - decay) * decay ** (n - i) * seen[i] for i in range(1, n + 1))
        found = torch.cat([f.tensor for f in ema.averages[name]]).double()
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)  # 25 roundings of fp32, values below 20
        assert [(f.name, f.shape, f.offset) for f in ema.averages[name]] == [("one", (2,), 0), ("two", (3,), 1)]
    assert ema.fragments is ema.averages["ema"]


def test_a_rank_that_owns_nothing_keeps_nothing():
    engine = _Engine()
    engine.fragments = list
    ema = Ema(engine, DECAYS)
    ema.update()
    assert ema.averages == {"ema": [], "ema_0.5": []}


def test_a_step_that_was_skipped_moves_no_average():
    engine = _Engine()
    ema = Ema(engine, DECAYS)
    engine.weights, engine.stepped = [w + 1 for w in engine.weights], False
    ema.update()
    assert [f.tensor.tolist() for f in ema.averages["ema"]] == [[1.0, -2.0], [4.0]]
    engine.stepped = True
    ema.update()
    assert ema.averages["ema"][1].tensor.item() > 4
