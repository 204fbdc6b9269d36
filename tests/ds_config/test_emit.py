"""What deepspeed.initialize gets, and the combinations it would get wrong."""

import copy
import json
from pathlib import Path

import pytest

from dsmoe.base.errors import ConfigError
from dsmoe.base.recipe import OptimizerSpec
from dsmoe.ds_config import Batch, check_policy, engine_config, load_policy

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))
BATCH = Batch(global_batch=24, micro_batch=4, accumulation=3, world_size=2)


@pytest.fixture
def load(tmp_path):
    def make(**content):
        file = tmp_path / "engine.json"
        file.write_text(json.dumps(content))
        return load_policy(str(file))

    return make


def test_the_recipes_numbers_stand_where_auto_stood(load):
    policy = load(
        dsmoe={"about": "x", "optimizer": "torch"},
        train_batch_size="auto",
        optimizer="auto",
        scheduler="auto",
        gradient_clipping="auto",
        zero_optimization={"stage": 2, "overlap_comm": True},
        bf16={"enabled": True},
    )
    config = engine_config(policy, BATCH, OptimizerSpec(clip=0.5))
    assert config == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "bf16": {"enabled": True},
        "steps_per_print": 10**9,
    }


def test_emitting_does_not_change_the_policy(load):
    policy = load(zero_optimization={"stage": 1})
    before = copy.deepcopy(policy)
    config = engine_config(policy, BATCH, OptimizerSpec())
    config["zero_optimization"]["stage"] = 3
    config["train_batch_size"] = 1
    assert policy == before


def test_a_file_without_zero_states_stage_0_and_its_own_wishes_stay(load):
    config = engine_config(load(steps_per_print=7), BATCH, OptimizerSpec())
    assert config["zero_optimization"] == {"stage": 0}
    assert config["steps_per_print"] == 7


@pytest.mark.parametrize(("optimizer", "forced"), [("auto", True), ("cpu_adam", True), ("torch", False)])
def test_offload_uses_deepspeeds_cpu_optimizer_unless_torch_is_asked_for(load, optimizer, forced):
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    policy = load(dsmoe={"optimizer": optimizer}, zero_optimization=zero)
    assert engine_config(policy, BATCH, OptimizerSpec())["zero_force_ds_cpu_optimizer"] is forced
    assert "zero_force_ds_cpu_optimizer" not in engine_config(load(), BATCH, OptimizerSpec())


@pytest.mark.parametrize("file", SHIPPED, ids=lambda p: p.stem)
def test_deepspeed_takes_every_shipped_file_as_emitted(file, monkeypatch):
    from deepspeed.runtime.config import DeepSpeedConfig

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    batch = Batch(global_batch=12, micro_batch=4, accumulation=3, world_size=1)
    policy = load_policy(str(file))
    got = DeepSpeedConfig(engine_config(policy, batch, OptimizerSpec(clip=1.0)))
    assert (got.train_batch_size, got.train_micro_batch_size_per_gpu, got.gradient_accumulation_steps) == (12, 4, 3)
    assert got.gradient_clipping == 1.0
    assert got.zero_optimization_stage == policy.stage
    assert got.bfloat16_config.enabled == (policy.precision == "bf16")
    assert got.float16_config.enabled == (policy.precision == "fp16")
    assert got.optimizer_name is None
    assert got.scheduler_name is None


BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}


def with_experts(**zero):
    return {"dsmoe": {"expert_parallel_size": 2}, "zero_optimization": {"stage": 3} | zero}


OFFLOAD = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("content", "device", "is_moe", "words"),
    [
        (FP16, "cpu", True, ("fp16", "CPU", "use bf16")),
        (BF16, "cpu", True, ("bf16 with ZeRO stage 0", "use stage 1")),
        (BF16, "cuda", False, ("bf16 with ZeRO stage 0", "use stage 1")),
        (FP16, "cuda", True, ("fp16 with ZeRO stage 0", "use stage 1")),
        ({"dsmoe": {"expert_parallel_size": 2}}, "cpu", False, ("expert_parallel_size' is 2", "dense", "set 1")),
        (
            {"dsmoe": {"expert_parallel_size": 3}},
            "cpu",
            True,
            ("expert_parallel_size' is 3", "8 experts", "4 ranks", "1, 2, 4"),
        ),
        ({"dsmoe": {"expert_parallel_size": 8}}, "cpu", True, ("expert_parallel_size' is 8", "4 ranks", "1, 2, 4")),
        (with_experts(zero_quantized_gradients=True), "cuda", True, ("zero_quantized_gradients' is true", "drop it")),
        (with_experts(zero_quantized_weights=True), "cuda", True, ("zero_quantized_weights' is true", "drop it")),
        (with_experts(zero_hpz_partition_size=2), "cuda", True, ("zero_hpz_partition_size' is 2", "drop it")),
        (with_experts(stage=1, contiguous_gradients=False), "cpu", True, ("contiguous_gradients' is false", "drop it")),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "cpu",
            False,
            ("quantized_weights'", "GPU"),
        ),
        ({"dsmoe": {"optimizer": "cpu_adam"}}, "cuda", False, ("cpu_adam", "offload_optimizer")),
        ({"dsmoe": {"optimizer": "torch_fused"}, **OFFLOAD}, "cuda", False, ("torch_fused", "cpu_adam or torch")),
        ({"dsmoe": {"optimizer": "apex"}, **OFFLOAD}, "cuda", False, ("apex", "cpu_adam or torch")),
    ],
)
def test_what_deepspeed_would_do_wrongly_is_refused(load, content, device, is_moe, words):
    with pytest.raises(ConfigError) as error:
        check_policy(load(**content), device_type=device, num_experts=8 * is_moe, world_size=4)
    message = str(error.value)
    assert "\n" not in message
    for word in ("engine.json", *words):
        assert word in message


@pytest.mark.parametrize(
    ("content", "device"),
    [
        ({}, "cpu"),
        ({**FP16, "zero_optimization": {"stage": 1}}, "cuda"),
        ({**BF16, "zero_optimization": {"stage": 1}}, "cpu"),
        ({**BF16, "zero_optimization": {"stage": 3}}, "cuda"),
        ({"dsmoe": {"optimizer": "cpu_adam"}}, "cpu"),
        ({"dsmoe": {"optimizer": "cpu_adam"}, **OFFLOAD}, "cuda"),
        ({"dsmoe": {"optimizer": "torch"}, **OFFLOAD}, "cuda"),
        ({"dsmoe": {"optimizer": "torch_fused"}}, "cuda"),
        (with_experts(zero_hpz_partition_size=1, zero_quantized_gradients=False), "cuda"),
        (with_experts(stage=1, contiguous_gradients=True), "cpu"),
        ({"zero_optimization": {"stage": 1, "contiguous_gradients": False}}, "cpu"),
        ({"dsmoe": {"expert_parallel_size": 4}}, "cpu"),
    ],
)
def test_what_works_passes(load, content, device):
    check_policy(load(**content), device_type=device, num_experts=8, world_size=4)
