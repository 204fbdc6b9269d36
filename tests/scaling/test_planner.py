"""The ranking rule on made-up candidates, and recommendations for the paper's models."""

import dataclasses
import itertools

import pytest

from dsmoe.base.errors import ConfigError
from dsmoe.base.memory import Layout, ModelShape, RankMemory
from dsmoe.base.presets import preset
from dsmoe.ds_config import check_policy, layout_of, load_policy, resolve_batch
from dsmoe.scaling import layouts, planner
from dsmoe.scaling.layouts import Candidate, Fixed
from dsmoe.scaling.links import Cluster, LinkBytes
from dsmoe.scaling.planner import rank_layouts, short_name, write_best

GIB = 1 << 30
SIZES = {"input_size": 32, "channels": 4, "num_classes": 1000, "learn_sigma": True}


def ranked(name, nodes, gpus, memory=80, batch=256, **more):
    fixed = Fixed(**more.pop("fixed", {}))
    return rank_layouts(
        ModelShape(spec=preset(name), **SIZES),
        Cluster(nodes, gpus, memory * GIB),
        global_batch=batch,
        fixed=fixed,
        **more,
    )


def candidate(used=1, network=0.0, node=0.0, **changes):
    at = Layout(zero_stage=1, world_size=8, precision="bf16", micro_batch=4)
    memory = RankMemory({"start": {}, "backward begins": {"activations": used}}, {}, {})
    return Candidate(dataclasses.replace(at, **changes), memory, LinkBytes(node, network), 10)


def test_the_rule_in_its_order():
    """Each candidate is better than the next by one criterion, and worse by all that come later."""
    order = [
        candidate(used=9, network=5, micro_batch=4, zero_stage=1, node=5),
        candidate(used=10, network=5, micro_batch=4, zero_stage=1, node=5),
        candidate(used=1, network=5, micro_batch=4, zero_stage=1, node=6),
        candidate(used=1, network=5, micro_batch=4, zero_stage=2, node=1),
        candidate(used=1, network=5, micro_batch=2, zero_stage=1, node=1),
        candidate(used=1, network=6, micro_batch=8, zero_stage=1, node=1),
        candidate(used=1, network=2, micro_batch=8, zero_stage=1, node=1, activation_checkpointing="experts"),
        candidate(used=1, network=1, micro_batch=8, zero_stage=1, node=1, activation_checkpointing=True),
        candidate(used=1, network=1, micro_batch=8, zero_stage=1, node=1, offload_optimizer=True),
        candidate(used=11, network=1, micro_batch=8, zero_stage=1, node=1),
    ]
    for better, worse in itertools.pairwise(order):
        assert planner._order(better) < planner._order(worse)


def test_what_fits_is_recommended_and_what_trains_comes_first():
    found = ranked("L/2-8E2A", 1, 8)
    assert found.best.fits
    assert not found.best.refused
    assert found.best is next(c for c in found.candidates if not c.refused)
    assert not found.best.layout.activation_checkpointing
    assert {c.layout.zero_stage for c in found.by_stage()} == {1, 2, 3}


def test_a_small_gpu_needs_recompute_or_smaller_batches_first():
    """2.8 B parameters on 8 x 24 GiB: stage 1 alone would hold 5.3 GiB of weights and 5.3 of gradients a rank."""
    best = ranked("L/2-8E2A", 1, 8, memory=24).best
    assert not best.layout.offload_optimizer
    assert best.memory.device_bytes <= 21 * GIB


def test_what_does_not_train_is_recommended_only_when_nothing_else_fits(monkeypatch):
    monkeypatch.setattr(
        layouts, "refusal", lambda layout, num_experts: "no." if layout.expert_parallel_size > 1 else ""
    )
    assert ranked("L/2-8E2A", 1, 8).best.layout.expert_parallel_size == 1
    found = ranked("G/2-16E2A", 1, 8, memory=40, fixed={"zero_stage": 1})
    assert found.best.layout.expert_parallel_size > 1
    assert all(c.refused for c in found.by_stage())
    with pytest.raises(ConfigError, match=r"nothing is written to nowhere\.json; no"):
        write_best(found, "nowhere.json")


def test_binds_names_the_component_and_the_link():
    found = ranked("L/2-8E2A", 2, 8)
    assert found.binds(found.best) == "activations; network"
    short = found.candidates[0]
    short = dataclasses.replace(short, budget=short.memory.device_bytes - GIB)
    assert found.binds(short) == "activations: 1.0 GiB short"


def test_nothing_fits_says_what_is_short_and_what_helps():
    with pytest.raises(ConfigError) as error:
        ranked("G/2-16E2A", 1, 1, memory=24)
    text = str(error.value)
    # 16.5 B bf16 parameters are 30.7 GiB; 24 GiB less 3 leave 21.
    for words in ("nothing fits 1 x 1 GPUs of 24 GiB", "GiB a GPU of 21.0 GiB free", "GiB short",
                  "most is parameters (30.7 GiB", "more GPUs"):  # fmt: skip
        assert words in text, text
    with pytest.raises(ConfigError, match=r"most is activations .* recompute, a smaller micro-batch"):
        ranked("a6", 1, 8, memory=16, batch=2048, fixed={"micro_batch": 256, "activation_checkpointing": False})


@pytest.mark.parametrize(("name", "nodes", "memory"), [("a6", 1, 80), ("L/2-8E2A", 2, 24), ("S/2", 1, 16)])
def test_the_written_file_is_the_recommended_layout(tmp_path, name, nodes, memory):
    found = ranked(name, nodes, 8, memory=memory)
    path = tmp_path / "planned.json"
    write_best(found, str(path))
    policy = load_policy(str(path))
    check_policy(policy, device_type="cuda", num_experts=preset(name).num_experts, world_size=8)
    again = layout_of(policy, resolve_batch(policy, 256, 8 * nodes))
    written = found.best.layout
    assert dataclasses.replace(again, buckets=written.buckets) == written
    assert again.buckets.reduce == written.buckets.reduce
    assert short_name(found.best) in policy.block.about
