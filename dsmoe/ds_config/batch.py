"""Batch arithmetic: global batch = micro-batch x accumulation x ranks, from whichever of them are stated."""

from dataclasses import dataclass

from dsmoe.base.errors import ConfigError
from dsmoe.ds_config.policy import EnginePolicy


@dataclass(frozen=True)
class Batch:
    """Images: global_batch a step, micro_batch a rank and micro-step, accumulation micro-steps a step."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int


def resolve_batch(policy: EnginePolicy, global_batch: int, world_size: int) -> Batch:
    """Fill in what the file leaves "auto"; ConfigError names both sides of a contradiction."""
    stated = policy.stated_global_batch
    if stated is not None and stated != global_batch:
        raise ConfigError(
            f"{policy.path}: 'train_batch_size' is {stated} but the recipe's train.global_batch is {global_batch}; "
            'write "auto" in the file, or give train.global_batch the same number.'
        )
    if global_batch % world_size:
        raise ConfigError(
            f"train.global_batch {global_batch} does not divide over {world_size} ranks; "
            f"choose a multiple of {world_size}, such as {_nearest_multiple(global_batch, world_size)}."
        )
    per_rank = global_batch // world_size
    micro, accumulation = policy.micro_batch, policy.accumulation
    if micro is None:
        accumulation = accumulation or 1
        micro = per_rank // accumulation
    elif accumulation is None:
        accumulation = max(per_rank // micro, 1)
    if micro * accumulation != per_rank:
        raise ConfigError(
            f"{policy.path}: {_stated(policy)} do not make train.global_batch {global_batch} on {world_size} ranks "
            f"({per_rank} images a rank and step); choose a micro-batch and accumulation whose product is {per_rank}."
        )
    return Batch(global_batch, micro, accumulation, world_size)


def _stated(policy: EnginePolicy) -> str:
    named = [
        ("train_micro_batch_size_per_gpu", policy.micro_batch),
        ("gradient_accumulation_steps", policy.accumulation),
    ]
    return " and ".join(f"'{key}' {'auto' if value is None else value}" for key, value in named)


def _nearest_multiple(value: int, of: int) -> int:
    return max(of, round(value / of) * of)
