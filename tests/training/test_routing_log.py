"""Choices counted by layer, time and class against a plain loop over images; who is told dead and when."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from made_plan import made_plan, made_recipe

from dsmoe.training import routing_log as module
from dsmoe.training.routing_log import DEAD_INTERVALS, TIME_BINS, Routed, RoutingLog, class_rows

LAYERS, EXPERTS, CHOICES = 3, 4, 16 * 16 * 2  # 32 px in patches of 2, two experts a token
CPU = torch.device("cpu")
FLOW = {"prediction": "velocity", "schedule": "rectified_flow"}


def plan_of(classes=5, null_class=True, diffusion=None):
    plan = made_plan(made_recipe(model={"depth": LAYERS}, diffusion=diffusion or {}))
    facts = dataclasses.replace(plan.model, num_classes=classes, null_class=null_class)
    return dataclasses.replace(plan, model=facts)


def made_images(rng, images, classes, flow=False):
    """counts [B, L, E] of uneven routers, times t [B], labels y [B] with the null class among them."""
    counts = rng.multinomial(CHOICES, rng.dirichlet(np.full(EXPERTS, 0.5), size=(images, LAYERS)))
    t = (1 - rng.random(images)).astype(np.float32) if flow else rng.integers(0, 1000, images)
    return counts, t, rng.integers(0, classes + 1, images)


def routed(counts, t, y):
    """As a model's statistics give them: float32 shares."""
    share = torch.tensor(counts, dtype=torch.float32) / CHOICES
    return Routed(share.mean(0), share, torch.tensor(t), torch.tensor(y))


def tally(counts, t, y, classes, span=1000):
    """The sums an image at a time."""
    by_time, by_class = np.zeros((TIME_BINS, LAYERS, EXPERTS), int), np.zeros((classes + 1, LAYERS, EXPERTS), int)
    for image in range(len(counts)):
        by_time[min(int(np.floor(t[image] / span * TIME_BINS)), TIME_BINS - 1)] += counts[image]
        by_class[y[image]] += counts[image]
    return by_time, by_class


@pytest.mark.parametrize("flow", [False, True])
def test_sums_are_those_of_a_loop_over_images(flow):
    rng, classes = np.random.default_rng(0), 5
    counts, t, y = made_images(rng, 100, classes, flow)
    t[:4] = [1, 0.1, 0.5, 1e-6] if flow else [0, 99, 100, 999]
    log = RoutingLog(plan_of(classes, diffusion=FLOW if flow else None), CPU)
    for some in (slice(0, 7), slice(7, 64), slice(64, 100)):  # micro-batches of any size
        log.add(routed(counts[some], t[some], y[some]))
    window = log.take()
    by_time, by_class = tally(counts, t, y, classes, 1 if flow else 1000)
    assert np.array_equal(window.by_timestep, by_time)
    assert np.array_equal(window.by_class, by_class)

    maps = json.loads(json.dumps(window.maps()))
    assert maps["images"] == 100
    np.testing.assert_allclose(maps["load"], counts.sum(0) / (100 * CHOICES), atol=0.5e-6)
    assert maps["class_images"] == [int((y == row).sum()) for row in range(classes + 1)]
    assert sum(maps["timestep_images"]) == 100
    for row in range(classes + 1):
        np.testing.assert_allclose(maps["by_class"][row], counts[y == row].mean(0) / CHOICES, atol=0.5e-4)
    assert maps["classes"] == ["0", "1", "2", "3", "4", "none"]
    again = log.take()
    assert again.by_timestep.sum() == again.by_class.sum() == 0, "a new window begins empty"
    assert np.array_equal(again.maps()["by_class"], np.zeros((classes + 1, LAYERS, EXPERTS)))


def test_shares_give_back_every_number_of_choices():
    """960 px through a codec of factor 8, patch 2: 7200 choices an image and layer; float32 shares are rounded."""
    plan = plan_of()
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, input_size=120))
    counts = torch.arange(7201).repeat_interleave(LAYERS * EXPERTS).view(-1, LAYERS, EXPERTS)
    labels = torch.zeros(7201, dtype=torch.int64)
    log = RoutingLog(plan, CPU)
    log.add(Routed(torch.zeros(0), counts.float() / 7200, labels, labels))
    assert torch.equal(log.take().by_timestep[0], counts.sum(0))


@pytest.fixture
def as_rank(monkeypatch):
    """Whether this process is rank 0."""
    return lambda main: monkeypatch.setattr(module.distributed, "is_main", lambda: main)


def added(parts):
    """What the ranks' sum is to each of them."""
    return lambda tensor: tensor.copy_(sum(parts))


def test_two_ranks_that_stop_and_go_on_count_what_one_does(monkeypatch, as_rank):
    rng, classes, plan = np.random.default_rng(1), 5, plan_of()
    counts, t, y = made_images(rng, 60, classes)
    alone = RoutingLog(plan, CPU)
    alone.add(routed(counts, t, y))
    expected = alone.take()

    ranks = [RoutingLog(plan, CPU), RoutingLog(plan, CPU)]
    for rank, log in enumerate(ranks):
        log.add(routed(counts[rank:40:2], t[rank:40:2], y[rank:40:2]))
    monkeypatch.setattr(module.distributed, "all_reduce_", added([log._counts.clone() for log in ranks]))
    saved = json.loads(json.dumps(ranks[0].position()))
    assert json.loads(json.dumps(ranks[1].position())) == saved
    resumed = []
    for rank in range(4):  # goes on with another number of ranks
        as_rank(rank == 0)
        log = RoutingLog(plan, CPU, saved)
        log.add(routed(counts[40 + rank :: 4], t[40 + rank :: 4], y[40 + rank :: 4]))
        resumed.append(log)
    monkeypatch.setattr(module.distributed, "all_reduce_", added([log._counts.clone() for log in resumed]))
    for log in resumed:
        window = log.take()
        assert torch.equal(window.by_timestep, expected.by_timestep)
        assert torch.equal(window.by_class, expected.by_class)
        assert window.maps() == expected.maps()


def test_saving_leaves_the_open_window_alone(monkeypatch):
    counts, t, y = made_images(np.random.default_rng(2), 9, 5)
    log = RoutingLog(plan_of(), CPU)
    log.add(routed(counts, t, y))
    with monkeypatch.context() as two_ranks:
        two_ranks.setattr(module.distributed, "all_reduce_", lambda tensor: tensor.mul_(2))
        log.position()
    assert torch.equal(log.take().by_timestep.sum(0), torch.tensor(counts.sum(0)))


@pytest.mark.parametrize("classes", [1, 2, 63, 64, 65, 100, 1000, 1001])
def test_every_class_is_in_the_row_that_names_it(classes):
    names = class_rows(classes, True)
    assert len(names) == min(classes, 64) + 1
    log, ids = RoutingLog(plan_of(classes), CPU), torch.arange(classes + 1)
    share = torch.full((1, LAYERS, EXPERTS), 1 / EXPERTS)
    covered = []
    for row, name in enumerate(names):
        first, last = (classes, classes) if name == "none" else (int(n) for n in (name.split("-") * 2)[:2])
        covered += range(first, last + 1)
        inside = ids[first : last + 1]
        log.add(Routed(share, share.expand(len(inside), -1, -1), torch.zeros_like(inside), inside))
        images = log.take().maps()["class_images"]
        assert images == [len(inside) if other == row else 0 for other in range(len(names))]
    assert covered == ids.tolist()
    assert class_rows(classes, False) == names[:-1]
    assert max(len(name.split("-")) for name in names) == (1 if classes <= 64 else 2)


def test_rows_are_named_in_groups_of_neighbours():
    names = class_rows(1000, True)
    assert (names[0], names[1], names[-2], names[-1]) == ("0-15", "16-31", "985-999", "none")


def test_without_a_null_class_there_is_no_row_for_it():
    log = RoutingLog(plan_of(null_class=False), CPU)
    counts, t, y = made_images(np.random.default_rng(3), 20, 4)  # labels 0 to 4
    log.add(routed(counts, t, y))
    assert np.array_equal(log.take().by_class, tally(counts, t, y, 4)[1])


def load_with(dead):
    """Loads [L, E] in which these (layer, expert) get 4 % of their fair share, the others more."""
    load = torch.ones(LAYERS, EXPERTS)
    for place in dead:
        load[place] = 0.04
    return (load / EXPERTS).double()


def told(caplog):
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    caplog.clear()
    return lines


def test_the_alarm_tells_a_death_once_and_a_return_once(caplog):
    log, one, other = RoutingLog(plan_of(), CPU), (0, 3), (2, 1)
    story = [
        ([one], []),
        ([], []),  # one interval is no death
        ([one], []),
        ([one, other], ["DEAD at 400 images, below 5 % of a fair share for 2 log intervals: layer 0 expert 3 (4.0%)"]),
        ([one, other], ["DEAD at 500 images, below 5 % of a fair share for 2 log intervals: layer 2 expert 1 (4.0%)"]),
        ([one, other], []),
        ([other], ["no longer dead at 700 images: layer 0 expert 3 (100.0%)"]),
        ([one, other], []),
        ([], ["no longer dead at 900 images: layer 2 expert 1 (100.0%)"]),
        ([], []),
    ]
    assert DEAD_INTERVALS == 2
    for interval, (dead, expected) in enumerate(story, start=1):
        log.watch(load_with(dead), interval * 100)
        assert told(caplog) == expected, interval
        log = RoutingLog(plan_of(), CPU, json.loads(json.dumps(log.position())))  # a resumption between any two


def test_many_deaths_are_one_line(caplog):
    plan = made_plan(made_recipe(model={"depth": LAYERS, "num_experts": 32}))
    log, load = RoutingLog(plan, CPU), torch.zeros(LAYERS, 32)
    load[:, :2] = 0.5
    for _ in range(3):
        log.watch(load, 1)
    (line,) = told(caplog)
    assert line.count("expert ") == 20
    assert line.endswith("layer 0 expert 21 (0.0%), and 70 more")
