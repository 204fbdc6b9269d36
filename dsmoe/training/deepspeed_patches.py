"""Changes to DeepSpeed's own behaviour, each with its reason; idempotent, made when called, which imports it."""

import functools
from collections.abc import Callable, Sequence

import torch

from dsmoe.runtime import distributed
from dsmoe.training.gradient_norm import l2_norm

_SHM_OP = "deepspeed_shm_comm"


def skip_shm_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce; call it before deepspeed.initialize.

    On CPU every start builds or loads that extension: about 60 CPU seconds the first time, and a process
    killed meanwhile leaves a lock on which all later runs wait for ever. It serves only
    `inference_all_reduce`, which training never calls. DeepSpeed has no setting for it; it builds what the
    private table of compatible operations allows, so the entry is turned off there. On GPU it changes
    nothing: the builder exists on CPU only.
    """
    import deepspeed

    table = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(table, dict):
        table[_SHM_OP] = False


def skip_lone_reduction(engine: object) -> None:
    """On one rank, keep a DeepSpeed engine from copying all gradients into a buffer, averaging and copying back.

    The average over one rank is the gradient itself. On CPU those copies are a tenth of the quick start's step. At
    stages 1 and 2 it helps without contiguous_gradients only, whose buffer is filled before.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        engine.enable_backward_allreduce = False
    elif stage == 3:
        engine.optimizer._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = _whole_gradients
    elif hasattr(engine.optimizer, "buffered_reduce_fallback"):
        engine.optimizer.buffered_reduce_fallback = _nothing


def _nothing(*arguments: object, **options: object) -> None:
    return None


def _whole_gradients(parameters: list[torch.Tensor], communication_data_type: torch.dtype) -> list[torch.Tensor]:
    return [parameter.grad.view(-1) for parameter in parameters]


def share_fp32_weights(engine: object) -> None:
    """In fp32, let the optimizer of stages 1 to 3 update the model's own weights, not a copy that is copied back.

    DeepSpeed keeps fp32 master weights whatever the precision; in fp32 they are a second copy of the same numbers. This
    rank's part of the model's flat weights becomes their storage, so that the copy after each step is one onto itself,
    which torch leaves out. Offloaded weights lie on another device, and keep their copy on CPU too.
    """
    optimizer = engine.optimizer
    if engine.zero_cpu_offload():
        return
    if engine.zero_optimization_stage() == 3:
        stored = optimizer.fp16_partitioned_groups_flat
        masters = optimizer.fp32_partitioned_groups_flat
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        groups = zip(optimizer.parallel_partitioned_bit16_groups, optimizer.real_dp_process_group, strict=True)
        stored = [partitions[distributed.rank(group)] for partitions, group in groups]
        masters = optimizer.single_partition_of_fp32_groups
    else:
        return
    for master, weights in zip(masters, stored, strict=True):
        if weights.dtype == master.dtype and weights.device == master.device:
            master.data = weights.data
    if engine.zero_optimization_stage() < 3:
        optimizer._link_all_hp_params()  # its views of the masters


def take_norms_quickly(engine: object) -> None:
    """Let the optimizer of stages 1 to 3 take gradient norms by `l2_norm`, which makes no copies in fp64.

    Its own function still joins the ranks and judges the result; it gets the local norm for a gradient.
    """
    optimizer = engine.optimizer
    if not hasattr(optimizer, "get_grad_norm_direct"):
        return
    joined = optimizer.get_grad_norm_direct

    def quickly(gradients: list[torch.Tensor], params: list[torch.Tensor], norm_type: int = 2) -> torch.Tensor:
        return joined([l2_norm(gradients)], params, norm_type)

    optimizer.get_grad_norm_direct = quickly


def flatten_without_copy(engine: object) -> None:
    """Let the optimizer of stage 3 step on its buffer of gradients, whose parts it would join into a copy first."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.flatten = functools.partial(_flat, engine.optimizer.flatten)


def _flat(copy: Callable[[Sequence[torch.Tensor]], torch.Tensor], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensors as one flat one: a view where they lie in a row, else a copy."""
    first, end = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and tensor.storage_offset() == end and tensor.is_contiguous()):
            return copy(tensors)
        end += tensor.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))
