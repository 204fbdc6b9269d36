"""The enumerated layouts: all valid, none missing, against a brute-force search over every combination."""

import itertools

import pytest

from dsmoe.base.errors import ConfigError
from dsmoe.base.memory import ModelShape
from dsmoe.base.presets import preset
from dsmoe.scaling.layouts import Fixed, budget, candidates, enumerate_layouts
from dsmoe.scaling.links import Cluster

GIB = 1 << 30


def found(name, nodes, gpus, batch, precision="bf16", **fixed):
    cluster = Cluster(nodes, gpus, 80 * GIB)
    return list(
        enumerate_layouts(
            preset(name), cluster, global_batch=batch, precision=precision, averages=1, fixed=Fixed(**fixed)
        )
    )


def brute_force(experts, world, batch, precision):
    """Every combination of whole numbers that keeps the rules, as tuples."""
    valid = set()
    for stage, ep, micro, recompute, offload in itertools.product(
        range(4), range(1, 17), range(1, batch + 1), (False, True, "experts"), (False, True)
    ):
        if recompute == "experts" and not experts:
            continue
        if precision != "fp32" and stage == 0:
            continue
        if offload and stage == 0:
            continue
        if ep > 1 and (experts == 0 or experts % ep or world % ep):
            continue
        if batch % (micro * world) or bin(micro).count("1") != 1:
            continue
        valid.add((stage, ep, micro, recompute, offload))
    return valid


@pytest.mark.parametrize(
    ("name", "nodes", "gpus", "batch", "precision"),
    [
        ("S/2", 1, 1, 16, "fp32"),
        ("S/2", 2, 4, 64, "bf16"),
        ("S/2-8E2A", 1, 8, 96, "bf16"),
        ("S/2-16E2A", 2, 8, 64, "fp32"),
        ("S/2-8E2A", 3, 2, 60, "fp32"),
    ],
)
def test_none_is_missing_and_all_are_valid(name, nodes, gpus, batch, precision):
    layouts = found(name, nodes, gpus, batch, precision)
    mine = [
        (at.zero_stage, at.expert_parallel_size, at.micro_batch, at.activation_checkpointing, at.offload_optimizer)
        for at in layouts
    ]
    assert len(mine) == len(set(mine))
    assert set(mine) == brute_force(preset(name).num_experts, nodes * gpus, batch, precision)
    assert all(at.micro_batch * at.accumulation * nodes * gpus == batch for at in layouts)
    assert {at.precision for at in layouts} == {precision}


def test_what_is_fixed_stays():
    layouts = found("S/2-8E2A", 1, 8, 96, zero_stage=2, expert_parallel_size=4, micro_batch=6,
                    activation_checkpointing=True, offload_optimizer=False)  # fmt: skip
    assert len(layouts) == 1
    at = layouts[0]
    assert (at.zero_stage, at.expert_parallel_size, at.micro_batch, at.accumulation) == (2, 4, 6, 2)
    assert at.activation_checkpointing is True
    assert not at.offload_optimizer


def test_a_dense_model_has_no_experts_to_recompute():
    assert {at.activation_checkpointing for at in found("S/2-8E2A", 1, 8, 96)} == {False, True, "experts"}
    assert {at.activation_checkpointing for at in found("S/2", 1, 8, 96)} == {False, True}
    with pytest.raises(ConfigError, match=r"--recompute is experts, but the model is dense; choose blocks\."):
        found("S/2", 1, 8, 96, activation_checkpointing="experts")


@pytest.mark.parametrize(
    ("arguments", "fixed", "words"),
    [
        (("S/2", 1, 8, 100), {}, "--global-batch 100 does not divide over 8 GPUs; choose a multiple, such as 96"),
        (("S/2", 1, 8, 0), {}, "--global-batch 0 .* such as 8"),
        (("S/2", 1, 8, 64), {"micro_batch": 3}, "--micro-batch 3 does not divide the 8 images"),
        (("S/2", 1, 8, 64), {"zero_stage": 0}, "--zero is 0, but bf16 needs stage 1, 2 or 3"),
        (("S/2", 1, 8, 64, "fp32"), {"zero_stage": 0, "offload_optimizer": True}, "but offload needs stage 1"),
        (("S/2", 1, 8, 64), {"expert_parallel_size": 2}, "no experts on 8 GPUs allow 1"),
        (("S/2-8E2A", 1, 6, 48), {"expert_parallel_size": 4}, "8 experts on 6 GPUs allow 1, 2"),
    ],
)
def test_impossible_requests_are_one_line(arguments, fixed, words):
    with pytest.raises(ConfigError, match=words):
        found(*arguments, **fixed)


def test_a_reserve_is_kept():
    assert budget(Cluster(1, 1, 80 * GIB)) == pytest.approx(0.92 * 80 * GIB, abs=1)
    assert budget(Cluster(1, 1, 16 * GIB)) == 13 * GIB


def test_candidates_carry_memory_and_traffic():
    shape = ModelShape(spec=preset("S/2"), input_size=32, channels=4, num_classes=1000, learn_sigma=True)
    made = candidates(
        shape,
        Cluster(2, 2, 8 * GIB),
        global_batch=64,
        precision="bf16",
        averages=1,
        fixed=Fixed(offload_optimizer=False),
    )
    assert {c.fits for c in made} == {True}
    assert all(c.links.network > 0 and c.budget == 5 * GIB for c in made)
