"""Run by every rank: trains tiny models in many layouts and compares each with one bare torch process (plain_loop).

layout_cells.py CELLS with CELLS the JSON of a list of `Cell`s; prints one JSON line a cell on rank 0. A bf16 cell is
compared with the fp32 run, every other with the run of its own precision. After a router's choice flipped, weights
are not comparable any more: those figures are null.
"""

import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from plain_loop import (
    DECAYS,
    DTYPES,
    GLOBAL,
    STEPS,
    Cut,
    Trained,
    latents,
    new_model,
    objective,
    recipe,
    samples,
    selection_biases,
    task,
    train_plain,
)
from router_choices import Choices, compare_choices

from dsmoe.ds_config import load_policy
from dsmoe.moe.experts import global_place
from dsmoe.runtime import distributed
from dsmoe.runtime.device import Device
from dsmoe.training.deepspeed_patches import skip_shm_op
from dsmoe.training.ema import Ema
from dsmoe.training.engine import Engine, expert_layer, gather
from dsmoe.training.health import GradientWatch
from dsmoe.training.loop import Training, take_step
from dsmoe.training.optimizer import build_optimizer

ROOT = Path(__file__).resolve().parents[2]


class Cell(NamedTuple):
    """One layout of one run.

    kind: of plain_loop.SPECS. stage: of ZeRO, or None for the bare loop itself, data parallel without an engine.
    precision: of plain_loop.DTYPES; the engine takes fp32 and bf16. expert_parallel: ranks a set of experts.
    bias_rate: of the selection bias. offload: the optimizer's state and step on the CPU, as DeepSpeed offloads it.
    skip: a step in which the last rank's gradient is infinite (ZeRO 1-3, which look). file: of ds_configs, whose engine
    keys are taken instead of this script's.
    """

    kind: str
    scope: str
    stage: int | None
    accumulation: int
    checkpointing: bool = False
    precision: str = "fp32"
    seed: int = 3
    expert_parallel: int = 1
    bias_rate: float = 0.0
    offload: bool = False
    skip: int | None = None
    file: str = ""


class _Plan:
    """The two sections of a plan that the loop reads."""

    def __init__(self, recipe, accumulation):
        self.recipe = recipe
        self.engine = type("E", (), {"accumulation": accumulation})


class Run(NamedTuple):
    """A Training, and what its routers chose."""

    training: Training
    choices: Choices

    @property
    def engine(self):
        return self.training.engine

    @property
    def ema(self):
        return self.training.ema


def new_run(science, stage, accumulation, checkpointing, steps=None, expert_parallel=1, **config):
    """A Training over `steps` (default: all) under DeepSpeed; `config` goes over the engine's configuration."""
    cut = Cut(distributed.rank(), distributed.world_size(), accumulation)
    steps = steps or range(STEPS)
    config = {
        "train_batch_size": GLOBAL,
        "train_micro_batch_size_per_gpu": GLOBAL // cut.world // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": science.optimizer.clip,
        "zero_optimization": zero(stage),
        "steps_per_print": 10**9,
        **config,
    }
    model = new_model(science) if expert_parallel == 1 else spread_model(science, expert_parallel)
    model.activation_checkpointing = checkpointing
    choices = Choices(model)
    engine = Engine(model, build_optimizer(list(model.parameters()), science.optimizer, "torch_fused"), config)
    training = Training(
        plan=_Plan(science, accumulation),
        engine=engine,
        ema=Ema(engine, DECAYS),
        batches=_watched(choices, (index for step in steps for index in cut.indices(step))),
        codec=None,
        objective=objective(),
        task=task(science),
        watch=GradientWatch(engine.model.x_embedder, torch.device("cpu")),
        telemetry=None,
        sheets=None,
        device=torch.device("cpu"),
    )
    return Run(training, choices)


def zero(stage, **more):
    """DeepSpeed's block of that stage, with buffers small enough for tiny models to need several."""
    sizes = {"reduce_bucket_size": 20000, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 20000}
    return {"stage": stage, **sizes, **more}


def spread_model(science, expert_parallel):
    """`new_model`, of whose experts each rank holds its own."""
    whole = dict(new_model(science).named_parameters())
    model = new_model(science, expert_layer(expert_parallel))
    for name, parameter in model.named_parameters():
        start = global_place(parameter, tuple(parameter.shape))[1]
        parameter.data.copy_(whole[name].data.flatten()[start : start + parameter.numel()].view_as(parameter))
    return model


def _watched(choices, indices):
    for index in indices:
        choices.begin(index)
        yield latents(index)


def take_steps(run, steps):
    """Losses and gradient norms of these steps."""
    losses, norms = [], []
    for step in steps:
        report = take_step(run.training, step)
        run.ema.update()
        losses.append(report.figures[:, 0].mean().item())
        if run.engine.stepped:
            norms.append(report.figures[0, 6].item())
    return losses, norms


def whole_state(run):
    """Final weights and averages, whole on every rank."""
    shapes = run.engine.shapes()
    averages = {kind: dict(gather(fragments, shapes)) for kind, fragments in run.ema.averages.items()}
    return dict(gather(run.engine.fragments(), shapes)), averages


def finish(run, losses, norms, steps):
    """What a run that took exactly `steps` leaves behind; its engine ends."""
    choices = run.choices.decisions(samples(steps), shared=distributed.world_size() > 1)
    biases = [bias.clone() for bias in selection_biases(run.engine.model)]
    found = Trained(losses, norms, *whole_state(run), choices, biases)
    run.engine.engine.destroy()
    return found


def train_cell(science, cell):
    """(what the run leaves behind, elements of the average that this rank holds)."""
    if cell.stage is None:
        cut = Cut(distributed.rank(), distributed.world_size(), cell.accumulation)
        return train_plain(science, DTYPES[cell.precision], cut), 0
    config = {"bf16": {"enabled": True}} if cell.precision == "bf16" else {}
    if cell.offload:
        config["zero_optimization"] = zero(cell.stage, offload_optimizer={"device": "cpu"})
        config["zero_force_ds_cpu_optimizer"] = False
    if cell.file:
        config |= load_policy(str(ROOT / "ds_configs" / cell.file)).passed
    run = new_run(
        science, cell.stage, cell.accumulation, cell.checkpointing, expert_parallel=cell.expert_parallel, **config
    )
    if cell.skip is not None:
        overflow(run.engine.model, cell.skip, cell.accumulation)
    losses, norms = take_steps(run, range(STEPS))
    own = sum(f.tensor.numel() for f in run.ema.fragments)
    return finish(run, losses, norms, range(STEPS)), own


def overflow(model, step, accumulation):
    """Make this rank's gradients infinite in the last micro-batch of that step, if it is the last rank."""
    calls = itertools.count(1)

    def look(module, inputs, output):
        if next(calls) == (step + 1) * accumulation and distributed.rank() == distributed.world_size() - 1:
            output.register_hook(lambda gradient: gradient * math.inf)

    model.final_layer.register_forward_hook(look)


def without_key_bias(name, tensor):
    """qkv.bias without its K third, whose true gradient is zero: softmax ignores a shift of all keys.

    AdamW turns the rounding noise there into full-size steps; the design's invariance statement lists it.
    """
    if not name.endswith("attn.qkv.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


def largest(values):
    """The largest; infinity when one is not a number, which `max` would pass over."""
    values = list(values)
    return math.inf if any(math.isnan(v) for v in values) else max(values, default=0.0)


def relative(found, truth):
    """Largest ||d|| / ||p|| over parameters."""
    pairs = [(without_key_bias(n, found[n]), without_key_bias(n, truth[n].detach())) for n in truth]
    return largest(((a - b).norm() / b.norm().clamp_min(1e-12)).item() for a, b in pairs)


def key_bias(found, truth):
    """Largest difference in the K third of a qkv.bias, which `relative` leaves out."""
    thirds = [(found[n].chunk(3)[1], truth[n].chunk(3)[1]) for n in truth if n.endswith("attn.qkv.bias")]
    return largest((a - b).abs().max().item() for a, b in thirds)


def compare(found, truth):
    """Figures of the invariance statement: largest differences of `found` from `truth` (both Trained)."""
    chosen = compare_choices(found.choices, truth.choices)
    pairs = list(zip(found.losses, truth.losses, strict=True))
    figures = {
        "loss": largest(abs(a - b) / abs(b) for a, b in pairs),
        "norm": largest(abs(a - b) / b for a, b in zip(found.norms, truth.norms, strict=True)),
        "rms": (sum((a - b) ** 2 for a, b in pairs) / len(pairs)) ** 0.5,
        "weights": None,
        "average": None,
        "key_bias": None,
        "bias": None,
    }
    if not chosen["flips"]:
        averages = [relative(found.averages[kind], truth.averages[kind]) for kind in DECAYS]
        figures |= {"weights": relative(found.weights, truth.weights), "average": largest(averages)}
        figures["key_bias"] = key_bias(found.weights, truth.weights)
        figures["bias"] = largest((a - b).abs().max().item() for a, b in zip(found.biases, truth.biases, strict=True))
    return figures | chosen


def main():
    distributed.initialize(distributed.discover(os.environ), Device("cpu"))
    skip_shm_op()
    cells = [Cell(*values) for values in json.loads(sys.argv[1])]
    # All before the first engine: ZeRO-3 puts its own F.linear in place for the rest of the process.
    references = {}
    for cell in cells:
        key = reference_key(cell)
        if key not in references:
            references[key] = train_plain(science_of(cell), DTYPES[key[-1]], skip=cell.skip)
    for cell in cells:
        science, truth = science_of(cell), references[reference_key(cell)]
        found, own = train_cell(science, cell)
        initial = {n: p.detach() for n, p in new_model(science).named_parameters()}
        line = compare(found, truth) | {
            "cell": cell,
            "moved": relative(truth.averages["ema"], initial),
            "clipped": sum(n > science.optimizer.clip for n in truth.norms),
            "steered": largest(bias.abs().max().item() for bias in truth.biases),
            "own": own,
            "all": sum(p.numel() for p in initial.values()),
        }
        if distributed.is_main():
            print("CELL " + json.dumps(line), flush=True)
    distributed.shutdown()


def science_of(cell):
    return recipe(cell.kind, cell.scope, cell.seed, cell.bias_rate)


def reference_key(cell):
    precision = "fp64" if cell.precision == "fp64" else "fp32"
    return cell.kind, cell.scope, cell.seed, cell.bias_rate, cell.skip, precision


if __name__ == "__main__":
    main()
