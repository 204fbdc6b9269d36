"""Between a ds_config and a Layout: the sizes of a policy's buffers, and the ds_config that a layout asks for."""

import json
from pathlib import Path

from dsmoe.base.errors import ConfigError
from dsmoe.base.memory import Buckets, Layout
from dsmoe.ds_config.batch import Batch
from dsmoe.ds_config.emit import check_policy
from dsmoe.ds_config.policy import BATCH_KEYS, OURS, RECIPE_KEYS, DsmoeBlock, EnginePolicy

# Field of Buckets -> (key, DeepSpeed 0.19.8's default; zero/config.py).
_SIZES = {
    "reduce": ("reduce_bucket_size", 500_000_000),
    "gather": ("allgather_bucket_size", 500_000_000),
    "prefetch": ("stage3_prefetch_bucket_size", 50_000_000),
    "live": ("stage3_max_reuse_distance", 1_000_000_000),
    "persistent": ("stage3_param_persistence_threshold", 100_000),
    "sub_group": ("sub_group_size", 1_000_000_000),
}
_BY_STAGE = {0: (), 1: ("reduce", "gather"), 2: ("reduce", "gather"), 3: tuple(n for n in _SIZES if n != "gather")}
_LIVE = "stage3_max_live_parameters"
_OVERLAP = "overlap_comm"
_OFFLOADS = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_parameters"}


def layout_of(policy: EnginePolicy, batch: Batch, averages: int = 1, *, compiled_ops: bool = False) -> Layout:
    """The layout that a policy and a batch make, with DeepSpeed's own sizes where the file gives none.

    compiled_ops: whether the compiled operations will run, which no file says: it depends on the machine.
    """
    zero = {key: value for key, value in policy.passed.get("zero_optimization", {}).items() if value != "auto"}
    return Layout(
        zero_stage=policy.stage,
        world_size=batch.world_size,
        precision=policy.precision,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        expert_parallel_size=policy.block.expert_parallel_size,
        activation_checkpointing=policy.block.activation_checkpointing,
        offload_optimizer=policy.offload_optimizer,
        offload_parameters=policy.offload_parameters,
        averages=averages,
        compiled_ops=compiled_ops,
        buckets=Buckets(
            **{name: int(zero.get(key, default)) for name, (key, default) in _SIZES.items()},
            overlap=bool(zero.get(_OVERLAP, policy.stage == 3)),
        ),
    )


def policy_tree(layout: Layout, about: str) -> dict:
    """The ds_config of a layout as plain mappings: every buffer that its stage has is stated, the recipe's keys "auto".

    The micro-batch is stated and accumulation left to follow from the recipe's global batch and the ranks.
    """
    tree: dict = {
        OURS: {
            "about": about,
            "expert_parallel_size": layout.expert_parallel_size,
            "activation_checkpointing": layout.activation_checkpointing,
        },
        **dict.fromkeys(RECIPE_KEYS, "auto"),
        BATCH_KEYS[0]: layout.micro_batch,
        BATCH_KEYS[1]: "auto",
    }
    if layout.precision != "fp32":
        tree[layout.precision] = {"enabled": True}
    zero = {"stage": layout.zero_stage}
    for name in _BY_STAGE[layout.zero_stage]:
        zero[_SIZES[name][0]] = getattr(layout.buckets, name)
    if layout.zero_stage:
        zero[_OVERLAP] = layout.buckets.overlap
    if layout.zero_stage == 3:
        zero[_LIVE] = layout.buckets.live
    for key, field in _OFFLOADS.items():
        if getattr(layout, field):
            zero[key] = {"device": "cpu"}
    tree["zero_optimization"] = zero
    return tree


def refusal(layout: Layout, *, num_experts: int) -> str:
    """Why this version does not train a layout on GPUs (the line of check_policy), or ""."""
    policy = EnginePolicy(
        path="layout",
        block=DsmoeBlock(
            expert_parallel_size=layout.expert_parallel_size,
            activation_checkpointing=layout.activation_checkpointing,
        ),
        stage=layout.zero_stage,
        precision=layout.precision,
        offload_optimizer=layout.offload_optimizer,
        offload_parameters=layout.offload_parameters,
        stated_global_batch=None,
        micro_batch=layout.micro_batch,
        accumulation=layout.accumulation,
        passed={},
    )
    try:
        check_policy(policy, device_type="cuda", num_experts=num_experts, world_size=layout.world_size)
    except ConfigError as error:
        return str(error)
    return ""


def write_policy(path: str | Path, layout: Layout, about: str) -> None:
    """Write the ds_config of a layout as JSON; ConfigError when the file cannot be written."""
    text = json.dumps(policy_tree(layout, about), indent=2) + "\n"
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot write {path}: {reason}; give a path in a folder that exists.") from error
