"""Everything a run must find again, taken out of the engine and put back, under every ZeRO stage and precision.

Tensors travel as pieces (fp32 master, both moments, averages), the rest as plain data. Written for any layout to
read: pieces carry global shapes and offsets, plain data is the same on all ranks. Where files go: checkpoint.
"""

from collections.abc import Iterator

import torch

from dsmoe.base.errors import CheckpointError
from dsmoe.checkpoint.manifest import Piece
from dsmoe.checkpoint.reader import Reader
from dsmoe.training.ema import Ema
from dsmoe.training.engine import MASTER, Engine, flat_partitions

MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def local_pieces(engine: Engine, ema: Ema) -> list[Piece]:
    """What this rank writes: views, to be copied before the next step. Together the ranks' pieces cover all."""
    if not engine.inner_optimizer.state:  # fp16 may have skipped every step so far
        make_moments(engine)
    sources = {kind: engine.fragments(kind) for kind in (MASTER, *MOMENTS)} | ema.averages
    shares = [(kind, f.own_share()) for kind, found in sources.items() for f in found]
    return [Piece(kind, f.name, f.shape, f.offset, f.tensor) for kind, f in shares if f.tensor.numel()]


def total_bytes(parameters: int, averages: int) -> int:
    """Bytes of a checkpoint of a model with that many parameters and averages, all ranks together."""
    return 4 * parameters * (len((MASTER, *MOMENTS)) + averages)


def plain_state(engine: Engine) -> dict:
    """Optimizer step counter, loss scaler (fp16), and what balancing keeps: last loads and selection biases."""
    scaler = _loss_scaler(engine)
    return {
        "optimizer_steps": _optimizer_steps(engine),
        "loss_scaler": {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)},
        "previous_load": [moe.previous_load.tolist() for moe in _expert_layers(engine)],
        "buffers": {name: buffer.tolist() for name, buffer in engine.buffers().items()},
    }


def load(engine: Engine, ema: Ema, reader: Reader) -> None:
    """Put a checkpoint of any layout into a fresh engine and averages; CheckpointError when it does not fit."""
    make_moments(engine)
    for kind in (MASTER, *MOMENTS):
        for f in engine.fragments(kind):
            reader.fill(f.name, kind, f.shape, f.offset, f.tensor)
    for kind, fragments in ema.averages.items():
        for f in fragments:
            reader.fill(f.name, kind, f.shape, f.offset, f.tensor)
    _set_optimizer_steps(engine, reader.state["optimizer_steps"])
    _publish_weights(engine)
    scaler = _loss_scaler(engine)
    if scaler is not None:
        for name, value in reader.state["loss_scaler"].items():
            setattr(scaler, name, value)
    moes, loads = _expert_layers(engine), reader.state["previous_load"]
    if len(moes) != len(loads):
        raise CheckpointError(f"checkpoint {reader.folder} has {len(loads)} expert layers, the model {len(moes)}.")
    for moe, previous in zip(moes, loads, strict=True):
        moe.update_previous_load(torch.tensor(previous, device=moe.previous_load.device))
    saved = reader.state.get("buffers", {})
    if saved.keys() != engine.buffers().keys():
        raise CheckpointError(f"checkpoint {reader.folder} holds the buffers {sorted(saved)}, the model other ones.")
    for name, buffer in engine.buffers().items():
        buffer.copy_(torch.tensor(saved[name]))


def _expert_layers(engine: Engine) -> list[torch.nn.Module]:
    return [block.moe for block in engine.model.blocks if hasattr(block, "moe")]


def _loss_scaler(engine: Engine) -> object | None:
    """What holds the loss scale; only fp16 has one that matters."""
    return engine.engine.optimizer.loss_scaler if engine.dtype == torch.float16 else None


@torch.no_grad()
def make_moments(engine: Engine) -> None:
    """Let AdamW make its state as it would at its first step: zeros, counted as no step; weights do not move.

    One step at rate 0 on zero gradients, a partition at a time, so that it works for every implementation.
    """
    inner = engine.inner_optimizer
    groups = inner.param_groups
    for group, flat in list(_partitions(engine)):
        parameters, rate, gradient = group["params"], group["lr"], flat.grad
        inner.param_groups = [group]
        group["params"], group["lr"], flat.grad = [flat], 0.0, torch.zeros_like(flat)
        inner.step()
        group["params"], group["lr"], flat.grad = parameters, rate, gradient
    inner.param_groups = groups
    _set_optimizer_steps(engine, 0)


def _partitions(engine: Engine) -> Iterator[tuple[dict, torch.Tensor]]:
    """Every tensor that AdamW keeps state for, with its parameter group."""
    groups = engine.inner_optimizer.param_groups
    if engine.stage == 0:
        yield from ((group, p) for group in groups for p in group["params"])
        return
    for i, flat in enumerate(flat_partitions(engine.engine.optimizer)):
        yield groups[engine.engine.optimizer.sub_group_to_group_id[i] if engine.stage == 3 else i], flat


def _optimizer_steps(engine: Engine) -> int:
    """Steps that AdamW counts for its bias correction; skipped fp16 steps are not among them."""
    inner = engine.inner_optimizer
    counters = [holder["step"] for holder in (*inner.state.values(), *inner.param_groups) if "step" in holder]
    return int(counters[0])


def _set_optimizer_steps(engine: Engine, steps: int) -> None:
    inner = engine.inner_optimizer
    for holder in (*inner.state.values(), *inner.param_groups):
        if isinstance(holder.get("step"), torch.Tensor):
            holder["step"].fill_(steps)
        elif "step" in holder:
            holder["step"] = steps


def _publish_weights(engine: Engine) -> None:
    """Make the weights of the forward pass those of the fp32 master; without it the next step runs on old ones."""
    optimizer = engine.engine.optimizer
    if engine.stage in (1, 2):
        optimizer.update_lp_params()
    elif engine.stage == 3:
        optimizer.checkpoint_event_prologue()
        for i in range(len(flat_partitions(optimizer))):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        optimizer.checkpoint_event_epilogue()  # gathers the small parameters that stay whole on every rank
