"""Batch arithmetic against the defining product, over every way of stating it."""

import itertools

import pytest

from dsmoe.base.errors import ConfigError
from dsmoe.ds_config.batch import resolve_batch
from dsmoe.ds_config.policy import DsmoeBlock, EnginePolicy


def policy(stated=None, micro=None, accumulation=None):
    return EnginePolicy(
        path="engine.json",
        block=DsmoeBlock(),
        stage=1,
        precision="fp32",
        offload_optimizer=False,
        offload_parameters=False,
        stated_global_batch=stated,
        micro_batch=micro,
        accumulation=accumulation,
        passed={},
    )


def expected(global_batch, world, micro, accumulation):
    """(micro, accumulation) by search over all products, or None; least accumulation where both are open."""
    for a, m in itertools.product(range(1, 25), range(1, 25)):
        if m * a * world == global_batch and micro in (None, m) and accumulation in (None, a):
            return m, a
    return None


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("global_batch", [1, 6, 8, 24])
def test_all_statements_give_the_product_or_an_error(world, global_batch):
    for micro, accumulation in itertools.product([None, 1, 2, 3, 24], repeat=2):
        want = expected(global_batch, world, micro, accumulation)
        given = policy(micro=micro, accumulation=accumulation)
        if want is None:
            with pytest.raises(ConfigError):
                resolve_batch(given, global_batch, world)
            continue
        batch = resolve_batch(given, global_batch, world)
        assert (batch.micro_batch, batch.accumulation) == want
        assert batch.micro_batch * batch.accumulation * world == batch.global_batch == global_batch
        assert batch.world_size == world


def test_a_stated_global_batch_must_be_the_recipes():
    assert resolve_batch(policy(stated=8), 8, 2).micro_batch == 4
    with pytest.raises(ConfigError, match=r"'train_batch_size' is 16 .*train.global_batch is 8; write \"auto\""):
        resolve_batch(policy(stated=16), 8, 2)


@pytest.mark.parametrize(("global_batch", "world", "offer"), [(10, 4, 8), (11, 4, 12), (1, 4, 4), (7, 2, 8)])
def test_a_batch_that_does_not_divide_over_ranks_is_offered_a_near_one(global_batch, world, offer):
    with pytest.raises(ConfigError, match=rf"global_batch {global_batch} .*over {world} ranks;.*such as {offer}\."):
        resolve_batch(policy(), global_batch, world)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"micro": 3}, ("'train_micro_batch_size_per_gpu' 3", "'gradient_accumulation_steps' auto")),
        ({"accumulation": 3}, ("'train_micro_batch_size_per_gpu' auto", "'gradient_accumulation_steps' 3")),
        ({"micro": 16}, ("'train_micro_batch_size_per_gpu' 16",)),
        ({"accumulation": 16}, ("'gradient_accumulation_steps' 16",)),
        ({"micro": 2, "accumulation": 3}, ("per_gpu' 2", "steps' 3")),
    ],
)
def test_a_contradiction_names_both_keys_and_the_product_needed(stated, words):
    with pytest.raises(ConfigError) as error:
        resolve_batch(policy(**stated), 16, 2)
    for word in ("engine.json", "train.global_batch 16 on 2 ranks", "product is 8", *words):
        assert word in str(error.value)
