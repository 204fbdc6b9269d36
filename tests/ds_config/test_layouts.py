"""From a layout to a ds_config file and back."""

import itertools

import pytest

from dsmoe.base.errors import ConfigError
from dsmoe.base.memory import Buckets, Layout
from dsmoe.ds_config import check_policy, layout_of, load_policy, refusal, resolve_batch, write_policy
from dsmoe.ds_config.layouts import policy_tree

OWN = Buckets(reduce=7, gather=8, prefetch=9, live=11, persistent=12, sub_group=13, overlap=True)
RELEVANT = {0: (), 1: ("reduce", "gather", "overlap"), 2: ("reduce", "gather", "overlap"),
            3: ("reduce", "prefetch", "live", "persistent", "sub_group", "overlap")}  # fmt: skip


def without_unused(layout):
    """The layout with only those buckets that its stage has."""
    used = {name: getattr(layout.buckets, name) for name in RELEVANT[layout.zero_stage]}
    return {**vars(layout), "buckets": used}


# bf16 at stage 0 is refused by check_policy.
@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), *itertools.product(("fp32", "bf16"), (1, 2, 3))])
def test_what_is_written_loads_as_the_same_layout(tmp_path, precision, stage):
    switches = itertools.product([False, True, "experts"], [False] if stage == 0 else [False, True], [False, True])
    for recompute, offload, parameters in switches:
        layout = Layout(
            zero_stage=stage,
            world_size=4,
            precision=precision,
            micro_batch=6,
            accumulation=2,
            activation_checkpointing=recompute,
            offload_optimizer=offload,
            offload_parameters=parameters and stage == 3,
            averages=2,
            buckets=OWN,
        )
        path = tmp_path / "made.json"
        write_policy(path, layout, "a test")
        policy = load_policy(str(path))
        check_policy(policy, device_type="cuda", num_experts=8, world_size=8)
        assert policy.block.about == "a test"
        again = layout_of(policy, resolve_batch(policy, 48, 4), 2)
        assert without_unused(again) == without_unused(layout)


def test_a_file_without_sizes_has_deepspeeds(tmp_path):
    path = tmp_path / "bare.json"
    path.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e6, "sub_group_size": "auto"}}')
    policy = load_policy(str(path))
    found = layout_of(policy, resolve_batch(policy, 8, 2)).buckets
    assert found == Buckets(
        reduce=5_000_000, gather=500_000_000, prefetch=50_000_000, live=1_000_000_000, persistent=100_000,
        sub_group=1_000_000_000, overlap=True,
    )  # fmt: skip


def test_defaults_are_those_of_the_installed_deepspeed():
    config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig()
    stated = {"reduce_bucket_size": 5e8, "allgather_bucket_size": 5e8, "prefetch_bucket_size": 5e7,
              "max_reuse_distance": 1e9, "param_persistence_threshold": 1e5, "sub_group_size": 1e9}  # fmt: skip
    assert {name: getattr(config, name) for name in stated} == stated


def test_refusal_is_the_line_of_check_policy():
    low = Layout(zero_stage=0, world_size=1, precision="bf16", micro_batch=1)
    assert "bf16 with ZeRO stage 0" in refusal(low, num_experts=0)
    assert refusal(Layout(zero_stage=1, world_size=1, precision="bf16", micro_batch=1), num_experts=8) == ""
    spread = Layout(zero_stage=1, world_size=4, precision="bf16", micro_batch=1, expert_parallel_size=3)
    assert "must divide" in refusal(spread, num_experts=8)


def test_every_buffer_of_the_stage_is_stated():
    zero = policy_tree(Layout(zero_stage=3, world_size=1, precision="bf16", micro_batch=1), "x")["zero_optimization"]
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == 100_000_000
    assert zero["reduce_bucket_size"] == 50_000_000


def test_a_path_that_cannot_be_written_is_one_line(tmp_path):
    layout = Layout(zero_stage=1, world_size=1, precision="bf16", micro_batch=1)
    with pytest.raises(ConfigError, match=r"cannot write .*; give a path in a folder that exists"):
        write_policy(tmp_path / "no" / "where.json", layout, "x")
