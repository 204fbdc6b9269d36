"""The expert layer under expert parallelism, as DeepSpeed's engine knows it. The only file below training that
imports deepspeed; sampling and converting use `dsmoe.moe.block.MoE`, whose state-dict keys are the same.

Written for DeepSpeed 0.19.8: the engine finds layers by their class, tells expert parameters by attributes, and
makes their process groups (expert_parallelism.md 3b-2). Nothing of DeepSpeed's own layer runs but that hand-shake.
"""

from dataclasses import dataclass

import deepspeed
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import Tensor
from torch.distributed import ProcessGroup

from dsmoe import ops
from dsmoe.base.presets import ModelSpec
from dsmoe.moe import dispatch
from dsmoe.moe.block import MoE
from dsmoe.moe.experts import End, Experts
from dsmoe.runtime import distributed


@dataclass(frozen=True)
class ExpertGroups:
    """Where this rank stands: `size` consecutive ranks share one set of experts (group `parallel`); the ranks with the
    same experts, one of each set, are `data`. name: what DeepSpeed calls the two."""

    size: int
    name: str
    parallel: ProcessGroup
    data: ProcessGroup


def create_groups(size: int) -> ExpertGroups:
    """Make or find the groups; `size` must divide the world. Call it before the model is built, on all ranks:
    zero.Init partitions an expert over its `data` group as soon as it exists."""
    deepspeed.init_distributed(dist_init_required=False)
    groups._create_expert_and_data_parallel(size)
    name = f"ep_size_{size}"
    return ExpertGroups(
        size, name, groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
    )


class ExpertParallelMoE(MoE, AutoEPMoELayer):
    """`MoE` with E / size experts on this rank, the same values as all of them on one."""

    def __init__(self, spec: ModelSpec, *, expert_groups: ExpertGroups, **balance: object) -> None:
        """balance: the rest of MoE's arguments."""
        self._groups = expert_groups
        MoE.__init__(self, spec, **balance)
        # What the engine asks a layer of its own for.
        self.num_experts, self.num_local_experts = spec.num_experts, len(self.experts.held)
        self.ep_size, self.ep_group_name, self.ep_group = expert_groups.size, expert_groups.name, expert_groups.parallel
        self.ep_rank = distributed.rank(expert_groups.parallel)
        self.folding_group_handles = None

    def new_experts(self, spec: ModelSpec) -> Experts:
        """This rank's experts."""
        return _LocalExperts(spec, self._groups)

    def mixture(self, tokens: Tensor, for_shared: Tensor, routing: ops.Routing, end: End) -> Tensor:
        """As in MoE; the shared expert runs while tokens are under way."""
        shared = self.shared_experts
        meanwhile = (lambda: None) if shared is None else (lambda: shared(for_shared))
        return dispatch.across(tokens, routing, self.experts, self._groups.parallel, meanwhile, **end._asdict())


class _LocalExperts(Experts):
    def __init__(self, spec: ModelSpec, expert_groups: ExpertGroups) -> None:
        count = spec.num_experts // expert_groups.size
        first = count * distributed.rank(expert_groups.parallel)
        held = range(first, first + count)
        super().__init__(spec.expert_kind, spec.num_experts, spec.dim, spec.mlp_hidden, held)
        # Here and not by the caller: zero.Init partitions the parameters when this constructor returns.
        for parameter in self.parameters():
            parameter.allreduce = False
            parameter.group_name = expert_groups.name
            parameter.is_expert_group = True
            parameter.expert_group = expert_groups.parallel
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = expert_groups.name
            parameter.ds_zero_partition_process_group = expert_groups.data
