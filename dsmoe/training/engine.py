"""The adapter to DeepSpeed: builds the engine, and shows its fp32 master weights and moments as fragments.

A fragment is the part of one parameter that this rank owns: name, global shape, offset in the flattened
parameter, and a flat fp32 view. EMA, weight export and checkpoints (state) see only fragments, so they work under
every ZeRO stage.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from dsmoe import ops
from dsmoe.base.plan import Plan
from dsmoe.moe.block import MoE
from dsmoe.moe.experts import global_place
from dsmoe.runtime import distributed
from dsmoe.training import deepspeed_patches as patches
from dsmoe.training.gradient_norm import l2_norm

MASTER = "master"


@dataclass(frozen=True)
class Fragment:
    """This rank's part of a parameter: elements [offset, offset + tensor.numel()) of the flattened whole.

    copies: how many ranks hold the same part, of which this is number `copy`.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    tensor: torch.Tensor
    copies: int = 1
    copy: int = 0

    def own_share(self) -> "Fragment":
        """This rank's cut of a part that several ranks hold, maybe empty; together their cuts are the part."""
        size = self.tensor.numel()
        low, high = size * self.copy // self.copies, size * (self.copy + 1) // self.copies
        return Fragment(self.name, self.shape, self.offset + low, self.tensor[low:high])


class Engine:
    """A DeepSpeed engine with the few verbs that the loop needs."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.stage = self.engine.zero_optimization_stage()
        self._own_norm = self.stage == 0
        self._norm: torch.Tensor | float | None = None
        if self._own_norm:
            # DeepSpeed would take the norm again, and wrongly where ranks hold different experts.
            self.engine.clip_fp32_gradients = self._clip
        if distributed.world_size() == 1:
            patches.skip_lone_reduction(self.engine)
        if self.stage:
            patches.share_fp32_weights(self.engine)
            patches.take_norms_quickly(self.engine)
            patches.flatten_without_copy(self.engine)

    @property
    def model(self) -> torch.nn.Module:
        """The module inside the engine; call the engine, not this, to train."""
        return self.engine.module

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of activations: what inputs are cast to."""
        return self.engine.get_data_types()[0]

    def __call__(self, *inputs: torch.Tensor) -> object:
        return self.engine(*inputs)

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of every parameter group for the next step."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of one micro-batch; DeepSpeed divides by the accumulation steps and averages over ranks."""
        self.engine.backward(loss)

    def step(self) -> None:
        """One micro-step; the optimizer moves at the accumulation boundary, which the engine counts."""
        if self._own_norm and self.engine.is_gradient_accumulation_boundary():
            # At stage 0 DeepSpeed reports no norm in fp32; the gradients are already averaged here.
            self._norm = _gradient_norm(self.model.parameters())
        self.engine.step()

    def _clip(self) -> None:
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.engine.gradient_clipping(), self._norm)

    @property
    def stepped(self) -> bool:
        """Whether the last `step` moved the weights: not within accumulation, nor where the gradient overflowed."""
        return self.engine.was_step_applied()

    def gradient_norm(self) -> float:
        """Global L2 norm of the last step's averaged gradient, before clipping; nan for a step that was skipped."""
        if not self.stepped:
            return math.nan  # DeepSpeed still shows the one before
        norm = self._norm if self._own_norm else self.engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every parameter, all experts included, in the order of named_parameters."""
        return {name: global_place(p, _shape(p))[0] for name, p in self.model.named_parameters()}

    def buffers(self) -> dict[str, torch.Tensor]:
        """What belongs to the weights and is no parameter: the selection biases, equal on all ranks."""
        return {name: b for name, b in self.model.named_buffers() if name.endswith(".selection_bias")}

    def fragments(self, kind: str = MASTER) -> list[Fragment]:
        """Views of this rank's fp32 master weights, in the order of named_parameters; no communication.

        kind: or the moments `exp_avg` and `exp_avg_sq`, which exist after the first step (or state.make_moments).
        """
        find = {0: _whole, 1: _zero12, 2: _zero12, 3: _zero3}[self.stage]
        found = []
        for name, parameter in self.model.named_parameters():
            place = find(self.engine, parameter)
            if place is not None:
                shape, start = global_place(parameter, _shape(parameter))
                flat = self._state(place.flat, kind).narrow(0, place.start, place.length)
                found.append(Fragment(name, shape, start + place.offset, flat, place.copies, place.copy))
        return found

    def master_place(self) -> tuple[int, ...]:
        """Where the master weights lie; while it stays the same, so do the views that `fragments` gives."""
        owners = self.model.parameters() if self.stage == 0 else flat_partitions(self.engine.optimizer)
        return tuple(owner.data_ptr() for owner in owners)

    def _state(self, owner: torch.Tensor, kind: str) -> torch.Tensor:
        found = owner if kind == MASTER else self.inner_optimizer.state[owner][kind]
        return found.detach().view(-1)

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The AdamW that was given, inside whatever DeepSpeed put around it."""
        return self.engine.optimizer if self.stage == 0 else self.engine.optimizer.optimizer


@dataclass(frozen=True)
class _Place:
    """Where this rank's part of a parameter lies: `length` elements from `start` in the optimizer's tensor `flat`.

    offset: where it begins in the flattened parameter of this rank. copies, copy: as in Fragment.
    """

    offset: int
    flat: torch.Tensor
    start: int
    length: int
    copies: int = 1
    copy: int = 0


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """L2 norm of the whole model's averaged gradient, the experts of other ranks included."""
    with_gradient = [p for p in parameters if p.grad is not None]
    experts = [p for p in with_gradient if hasattr(p, "expert_group")]
    norm = l2_norm(p.grad for p in with_gradient if not hasattr(p, "expert_group"))
    if not experts:
        return norm.float()
    squares = l2_norm(p.grad for p in experts).square()
    return (norm.square() + distributed.all_reduce_(squares, "sum", experts[0].expert_group)).sqrt().float()


def _whole(engine: object, parameter: torch.nn.Parameter) -> _Place:
    group = getattr(parameter, "ds_zero_partition_process_group", None)
    return _Place(0, parameter, 0, parameter.numel(), distributed.world_size(group), distributed.rank(group))


def flat_partitions(optimizer: object) -> list[torch.Tensor]:
    """The flat fp32 master partitions of a DeepSpeed optimizer of stage 1, 2 or 3; Adam's state is keyed by them."""
    # bf16 at stage 1 with fp32 gradient accumulation is another class (expert_parallelism.md 3e).
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
    return next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))


def _zero12(engine: object, parameter: torch.nn.Parameter) -> _Place | None:
    # The moments' own fragment links are incomplete in 0.19.8 with several groups (expert_parallelism.md 7);
    # the addresses below are right, and point into the flat fp32 partition.
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    flat = flat_partitions(engine.optimizer)[mapping.param_group_index]
    place = mapping.hp_fragment_address
    return _Place(mapping.lp_fragment_address.start, flat, place.start, place.numel)


def _zero3(engine: object, parameter: torch.nn.Parameter) -> _Place | None:
    optimizer, shard = engine.optimizer, parameter.ds_tensor.ds_numel
    offset = distributed.rank(parameter.ds_process_group) * shard
    own = min(shard, parameter.ds_numel - offset)  # the tail of the last shard is padding
    if own <= 0:
        return None
    # Not safe_get_local_fp32_param: with offload it returns a copy, and a load needs the optimizer's own memory.
    group, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return _Place(offset, flat_partitions(optimizer)[group], start, own)


def gather(fragments: list[Fragment], shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole fp32 tensors by name on the CPU of every rank, one at a time, from everybody's fragments.

    shapes: global shape of every parameter, same order on every rank (the collectives follow it). Exhaust it.
    """
    own = {f.name: f.own_share() for f in fragments}
    device = fragments[0].tensor.device if fragments else torch.device("cpu")
    for name, shape in shapes.items():
        flat = torch.zeros(math.prod(shape), dtype=torch.float32, device=device)
        if name in own:
            flat.narrow(0, own[name].offset, own[name].tensor.numel()).copy_(own[name].tensor)
        yield name, distributed.all_reduce_(flat, "sum").view(shape).cpu()


def build_engine(
    plan: Plan,
    make_model: Callable[[Callable[..., torch.nn.Module]], torch.nn.Module],
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    config: dict,
    device: torch.device,
) -> Engine:
    """The engine on `device`, with the plan's expert parallelism, activation checkpointing and preferred operations.

    make_model: from the class of the expert layers. Under ZeRO-3 parameters are partitioned as they are made, so no
    rank ever holds the whole model; under the other stages they are made on the CPU and moved.
    """
    import deepspeed

    ops.prefer(plan.engine.ops, device.type)
    logging.getLogger("dsmoe").info("compiled operations: %s", ops.kernels())
    # Groups first: partitioning an expert asks for them, and without them zero.Init hangs (expert_parallelism.md 3b-3).
    deepspeed.init_distributed(dist_init_required=False)
    layer = expert_layer(plan.engine.expert_parallel_size)
    sharded = deepspeed.zero.Init(config_dict_or_path=config, enabled=plan.engine.zero_stage == 3)
    with sharded:
        model = make_model(layer)
    model = model.to(device)
    model.activation_checkpointing = plan.engine.activation_checkpointing
    return Engine(model, make_optimizer(list(model.parameters())), config)


def expert_layer(expert_parallel_size: int) -> Callable[..., torch.nn.Module]:
    """The class of expert layers for that many ranks a set of experts; makes their groups, on all ranks."""
    if expert_parallel_size == 1:
        return MoE
    # Imported here: this imports deepspeed, which must not happen before runtime.distributed.initialize.
    from dsmoe.moe.deepspeed_layer import ExpertParallelMoE, create_groups

    return functools.partial(ExpertParallelMoE, expert_groups=create_groups(expert_parallel_size))
