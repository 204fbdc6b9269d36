"""The training loop in prose: what happens to one global batch, and in which order."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dsmoe.base.plan import Plan
from dsmoe.codec.protocol import Codec
from dsmoe.data.loader import Batch
from dsmoe.diffusion import TrainingObjective
from dsmoe.preprocess.memory import LatentBatch, posterior_of
from dsmoe.runtime import distributed
from dsmoe.tasks.class_conditional import ClassConditional
from dsmoe.training.checkpoints import Checkpoints
from dsmoe.training.ema import Ema
from dsmoe.training.engine import Engine
from dsmoe.training.health import GradientWatch
from dsmoe.training.optimizer import learning_rate
from dsmoe.training.routing_log import Routed
from dsmoe.training.sampling import SampleSheets
from dsmoe.training.telemetry import FIELDS, StepReport, Telemetry, gather_report


@dataclass
class Training:
    """Everything that a step touches. Progress is counted in images (design decision 3)."""

    plan: Plan
    engine: Engine
    ema: Ema
    batches: Iterator[Batch | LatentBatch]
    codec: Codec
    objective: TrainingObjective
    task: ClassConditional
    watch: GradientWatch
    telemetry: Telemetry
    sheets: SampleSheets
    device: torch.device
    checkpoints: Checkpoints | None = None
    start_step: int = 0


def train(run: Training) -> None:
    """Train from start_step to the last image; TrainingFailure on a non-finite loss or gradient.

    Stopped when the run was asked to stop and has saved itself.
    """
    for step in range(run.start_step, run.plan.recipe.train.steps):
        advance(run, step)
    run.telemetry.flush()
    if run.checkpoints is not None:
        run.checkpoints.close()


def advance(run: Training, step: int) -> None:
    """All that happens from one global batch to the next: the step, the average, figures, sheets, checkpoints."""
    report = take_step(run, step)
    run.ema.update()
    run.telemetry.push(report)
    if run.sheets.due(step + 1):
        run.telemetry.flush()
        run.sheets.draw(run.engine, run.ema, (step + 1) * run.plan.recipe.train.global_batch)
    if run.checkpoints is not None:
        run.checkpoints.after_step(step + 1)


def take_step(run: Training, step: int) -> StepReport:
    """One optimizer step over one global batch, in micro-steps whose boundary the engine counts."""
    recipe, accumulation = run.plan.recipe, run.plan.engine.accumulation
    rate = learning_rate(recipe.optimizer, step * recipe.train.global_batch, recipe.train.images)
    run.engine.set_learning_rate(rate)
    figures = torch.zeros(len(FIELDS), device=run.device)
    load, routed = None, []
    for _ in range(accumulation):
        waited = time.perf_counter()
        batch = next(run.batches).to(run.device)
        waited = time.perf_counter() - waited
        loss, measured, sent = micro_loss(run, batch)
        run.engine.backward(loss)
        run.engine.step()
        figures[:5] += measured / accumulation
        figures[7] += waited
        if sent is not None:
            routed.append(sent)
            load = sent.load / accumulation if load is None else load + sent.load / accumulation
    figures[5] = run.watch.take()
    figures[6] = run.engine.gradient_norm()
    if run.checkpoints is not None:
        figures[8:] = torch.tensor(run.checkpoints.figures())
    if load is not None and run.engine.stepped:
        _balance(run, load)
    return gather_report(step, rate, figures, routed)


def _balance(run: Training, load: torch.Tensor) -> None:
    """Tell the routers the load of the step just done: this rank's shares [L, E]."""
    balance, model = run.plan.recipe.balance, run.engine.model
    if balance.scope != "step" and not balance.bias_rate:
        return
    shared = distributed.all_reduce_(load.clone(), "mean")
    slots = run.plan.recipe.train.global_batch * model.tokens * model.spec.top_k
    for block, of_layer in zip(model.blocks, shared, strict=True):
        block.moe.update_previous_load(of_layer)
        if balance.bias_rate:
            block.moe.update_selection_bias((of_layer.double() * slots).round(), balance.bias_rate)


def micro_loss(run: Training, batch: Batch | LatentBatch) -> tuple[torch.Tensor, torch.Tensor, Routed | None]:
    """Loss of a micro-batch to back-propagate, its parts [loss, mse, vb, balance, z] detached, where it was routed.

    Every part is a mean over images of a per-image value (paper eq. 2; contracts 2.1.10), so the global-batch
    mean does not depend on how the batch is cut.
    """
    balance = run.plan.recipe.balance
    inputs = run.task.training_inputs(posterior_of(batch, run.codec), batch.labels, batch.index)
    x_t = run.objective.corrupt(inputs.x0, inputs.t, inputs.noise)
    output, stats = run.engine(x_t.to(run.engine.dtype), run.objective.model_time(inputs.t), inputs.y)
    terms = run.objective.training_loss(output, inputs.x0, x_t, inputs.t, inputs.noise)
    loss = terms.total.mean()
    extra, sent = torch.zeros(2, device=run.device), None
    if stats is not None:
        loss = loss + balance.coefficient * stats.balance_loss + balance.z_coefficient * stats.z_loss
        extra = torch.stack([stats.balance_loss, stats.z_loss]).detach() / run.plan.recipe.model.depth
        sent = Routed(stats.load, stats.load_per_sample, inputs.t, inputs.y)
    measured = torch.stack([loss.detach(), terms.mse.mean().detach(), terms.vb.mean().detach(), *extra])
    return loss, measured, sent
