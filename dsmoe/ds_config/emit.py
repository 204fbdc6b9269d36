"""What deepspeed.initialize gets: the checked policy with every shared key filled in by the recipe's numbers."""

import copy
import json
from collections.abc import Callable

from dsmoe.base.activations import EXPERTS
from dsmoe.base.errors import ConfigError
from dsmoe.base.recipe import OptimizerSpec
from dsmoe.ds_config.batch import Batch
from dsmoe.ds_config.policy import EnginePolicy


def check_policy(policy: EnginePolicy, *, device_type: str, num_experts: int, world_size: int) -> None:
    """Refuse what DeepSpeed 0.19.8 would do wrongly or late, with the reason (expert_parallelism.md 3a, 3b-6).

    device_type: "cpu" or "cuda". num_experts: 0 for a dense model.
    """
    path, block = policy.path, policy.block
    if policy.precision == "fp16" and device_type == "cpu":
        raise ConfigError(f"{path}: fp16 is not supported on CPU; use bf16, or fp32 (leave both out).")
    if policy.precision == "bf16" and policy.stage == 0:
        raise ConfigError(
            f"{path}: bf16 with ZeRO stage 0 steps AdamW once on zero gradients at start, so the first updates are "
            "about a quarter too small; use stage 1 (same memory on one rank) or fp32."
        )
    if policy.precision == "fp16" and policy.stage == 0:
        raise ConfigError(
            f"{path}: fp16 with ZeRO stage 0 hides its fp32 weights, which the moving average and checkpoints need; "
            "use stage 1 (same memory on one rank)."
        )
    if device_type == "cpu" and policy.passed.get("zero_optimization", {}).get("zero_quantized_weights"):
        raise ConfigError(f"{path}: 'zero_optimization.zero_quantized_weights' needs a GPU's kernels; drop it.")
    if block.activation_checkpointing == EXPERTS and not num_experts:
        raise ConfigError(
            f"{path}: 'dsmoe.activation_checkpointing' is \"{EXPERTS}\" but the model is dense; set true or false."
        )
    if block.expert_parallel_size > 1:
        _check_expert_parallel(policy, num_experts, world_size)
    if block.optimizer == "cpu_adam" and not policy.offload_optimizer and device_type != "cpu":
        raise ConfigError(
            f"{path}: 'dsmoe.optimizer' cpu_adam needs 'zero_optimization.offload_optimizer' on device cpu."
        )
    if policy.offload_optimizer and block.optimizer not in ("auto", "cpu_adam", "torch"):
        raise ConfigError(
            f"{path}: 'dsmoe.optimizer' {block.optimizer} runs on the device, but the optimizer is offloaded; "
            "use auto, cpu_adam or torch."
        )


def _check_expert_parallel(policy: EnginePolicy, num_experts: int, world_size: int) -> None:
    path, size = policy.path, policy.block.expert_parallel_size
    if not num_experts:
        raise ConfigError(f"{path}: 'dsmoe.expert_parallel_size' is {size} but the model is dense; set 1.")
    if num_experts % size or world_size % size:
        allowed = [n for n in range(1, num_experts + 1) if num_experts % n == 0 and world_size % n == 0]
        raise ConfigError(
            f"{path}: 'dsmoe.expert_parallel_size' is {size}; it must divide both the {num_experts} experts and the "
            f"{world_size} ranks: {', '.join(map(str, allowed))}."
        )
    zero = policy.passed.get("zero_optimization", {})
    for key, wrong, why in _NOT_WITH_EXPERT_PARALLEL:
        if wrong(zero.get(key)):
            raise ConfigError(
                f"{path}: 'zero_optimization.{key}' is {json.dumps(zero[key])} with 'dsmoe.expert_parallel_size' "
                f"{size}; {why}."
            )


# What DeepSpeed 0.19.8 rejects, or reduces over the wrong ranks, where ranks hold different experts.
_NOT_WITH_EXPERT_PARALLEL: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("zero_quantized_gradients", bool, "DeepSpeed cannot quantize the gradients of experts; drop it"),
    ("zero_quantized_weights", bool, "DeepSpeed gathers quantized weights over all ranks; drop it"),
    (
        "zero_hpz_partition_size",
        lambda value: isinstance(value, int) and value > 1,
        "DeepSpeed has no second partition for experts; drop it",
    ),
    (
        "contiguous_gradients",
        lambda value: value is False,
        "DeepSpeed then averages the gradients of different experts at stage 1, and fails at stage 2; drop it",
    ),
)


def engine_config(policy: EnginePolicy, batch: Batch, optimizer: OptimizerSpec) -> dict:
    """The dict for deepspeed.initialize(config=...). The optimizer and scheduler are given as objects, not here."""
    config = copy.deepcopy(policy.passed)
    config["train_batch_size"] = batch.global_batch
    config["train_micro_batch_size_per_gpu"] = batch.micro_batch
    config["gradient_accumulation_steps"] = batch.accumulation
    config["gradient_clipping"] = optimizer.clip
    config.setdefault("zero_optimization", {"stage": 0})
    if policy.offload_optimizer:
        config.setdefault("zero_force_ds_cpu_optimizer", policy.block.optimizer != "torch")
    config.setdefault("steps_per_print", 10**9)
    return config
