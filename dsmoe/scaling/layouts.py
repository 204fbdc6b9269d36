"""Which layouts a model can take on a cluster, and whether they fit its memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsmoe.base.activations import EXPERTS, RECOMPUTE
from dsmoe.base.errors import ConfigError
from dsmoe.base.memory import Layout, ModelShape, RankMemory, rank_memory
from dsmoe.base.presets import ModelSpec
from dsmoe.ds_config import refusal
from dsmoe.scaling.links import Cluster, LinkBytes, link_bytes

# Left free on each GPU: CUDA context, communication buffers, library workspaces, fragmentation.
RESERVE_SHARE, RESERVE_LEAST = 0.08, 3 << 30


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """What the user has settled; None leaves it open."""

    zero_stage: int | None = None
    expert_parallel_size: int | None = None
    micro_batch: int | None = None
    activation_checkpointing: bool | str | None = None
    offload_optimizer: bool | None = None


@dataclass(frozen=True)
class Candidate:
    """A layout and what it costs. budget: bytes a GPU has for it; refused: why it is not trained here yet, or ""."""

    layout: Layout
    memory: RankMemory
    links: LinkBytes
    budget: int
    refused: str = ""

    @property
    def fits(self) -> bool:
        return self.memory.device_bytes <= self.budget


def budget(cluster: Cluster) -> int:
    """Bytes a GPU's memory leaves for what `rank_memory` counts."""
    return cluster.gpu_memory - max(int(cluster.gpu_memory * RESERVE_SHARE), RESERVE_LEAST)


def candidates(
    shape: ModelShape,
    cluster: Cluster,
    *,
    global_batch: int,
    precision: str,
    averages: int,
    fixed: Fixed,
    compiled_ops: bool = False,
) -> list[Candidate]:
    """Every valid layout with its memory and traffic; ConfigError when the requirements leave none."""
    room = budget(cluster)
    found = [
        Candidate(
            layout,
            rank_memory(shape, layout),
            link_bytes(shape, layout, cluster),
            room,
            refusal(layout, num_experts=shape.spec.num_experts),
        )
        for layout in (
            replace(found, compiled_ops=compiled_ops)
            for found in enumerate_layouts(
                shape.spec, cluster, global_batch=global_batch, precision=precision, averages=averages, fixed=fixed
            )
        )
    ]
    assert found, "the choices below are checked one by one"
    return found


def enumerate_layouts(
    spec: ModelSpec, cluster: Cluster, *, global_batch: int, precision: str, averages: int, fixed: Fixed
) -> Iterator[Layout]:
    """ZeRO stage x expert-parallel size x micro-batch x recompute x offload, each within `fixed`."""
    world = cluster.world_size
    micros = _micro_batches(global_batch, world, fixed.micro_batch)
    sizes = _expert_parallel_sizes(spec, world, fixed.expert_parallel_size)
    recomputes = _recomputes(spec, fixed.activation_checkpointing)
    for stage in _stages(precision, fixed.zero_stage, fixed.offload_optimizer):
        offloads = [False] if stage == 0 else [False, True]
        for offload in _settled(offloads, fixed.offload_optimizer):
            for size in sizes:
                for micro in micros:
                    for recompute in recomputes:
                        yield Layout(
                            zero_stage=stage,
                            world_size=world,
                            precision=precision,
                            micro_batch=micro,
                            accumulation=global_batch // world // micro,
                            expert_parallel_size=size,
                            activation_checkpointing=recompute,
                            offload_optimizer=offload,
                            averages=averages,
                        )


def _recomputes(spec: ModelSpec, given: bool | str | None) -> list[bool | str]:
    if given == EXPERTS and not spec.is_moe:
        raise ConfigError("--recompute is experts, but the model is dense; choose blocks.")
    options = [what for what in RECOMPUTE if what != EXPERTS or spec.is_moe]
    return options if given is None else [given]


def _settled(options: list[bool], given: bool | None) -> list[bool]:
    return options if given is None else [given]


def _stages(precision: str, given: int | None, offload: bool | None) -> list[int]:
    """Low precision starts at stage 1 (ds_config.check_policy says why), and so does offload."""
    allowed = [0, 1, 2, 3] if precision == "fp32" and not offload else [1, 2, 3]
    if given is None:
        return allowed
    if given not in allowed:
        why = "offload" if precision == "fp32" else precision
        raise ConfigError(f"--zero is {given}, but {why} needs stage 1, 2 or 3; choose one of them.")
    return [given]


def _expert_parallel_sizes(spec: ModelSpec, world: int, given: int | None) -> list[int]:
    """Divisors of both the experts and the ranks."""
    experts = spec.num_experts or 1
    allowed = [size for size in range(1, min(experts, world) + 1) if experts % size == 0 and world % size == 0]
    if given is None:
        return allowed
    if given not in allowed:
        raise ConfigError(
            f"--expert-parallel is {given}; {experts if spec.is_moe else 'no'} experts on {world} GPUs allow "
            f"{', '.join(map(str, allowed))}."
        )
    return [given]


def _micro_batches(global_batch: int, world: int, given: int | None) -> list[int]:
    """Powers of two that divide a rank's share of the global batch; a given one need only divide it."""
    if global_batch < 1 or global_batch % world:
        near = max(world, round(global_batch / world) * world)
        raise ConfigError(
            f"--global-batch {global_batch} does not divide over {world} GPUs; choose a multiple, such as {near}."
        )
    share = global_batch // world
    if given is None:
        return [1 << power for power in range(share.bit_length()) if share % (1 << power) == 0]
    if given < 1 or share % given:
        raise ConfigError(f"--micro-batch {given} does not divide the {share} images a GPU has in a step.")
    return [given]
