"""Run by every rank: injects one made-up state into many layouts, and moves runs from one layout to another.

injected_cells.py FOLDER CELLS, CELLS the JSON of a list of `Move`s; one JSON line a cell on rank 0. Everything is
compared with a bare torch loop (plain_loop) that starts from the same state, or from the beginning: in fp32, and a bf16
layout also with that loop in bf16.
"""

import functools
import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from layout_cells import Run, compare, finish, new_run, take_steps
from plain_loop import DECAYS, DTYPES, GLOBAL, STEPS, State, Trained, new_model, recipe, train_plain
from router_choices import Decisions
from state_cells import begin, differing, saver_in, settings, write_lease

from dsmoe.base.recipe import Recipe
from dsmoe.checkpoint.choice import newest_whole
from dsmoe.checkpoint.manifest import Piece
from dsmoe.checkpoint.store import Store
from dsmoe.checkpoint.writer import write_shard
from dsmoe.runtime import distributed
from dsmoe.runtime.device import Device
from dsmoe.training import state
from dsmoe.training.deepspeed_patches import skip_shm_op

HALF = STEPS // 2
INJECTED, INJECTED_STEPS = "injected", 137
BEFORE, AFTER, CONTINUED = range(HALF), range(HALF, STEPS), range(HALF, HALF + STEPS)
STEPS_OF = {"inject": CONTINUED, "first": BEFORE, "second": AFTER}


class Move(NamedTuple):
    """A layout, what happens in it, and to which run.

    what: "inject" loads the made-up state, saves it again, and trains STEPS steps; "first" trains HALF steps from the
    beginning and saves FOLDER/name; "second" loads FOLDER/source, saves it again, and trains the other half.
    setting: of state_cells. expert_parallel: ranks a set of experts. kind, scope, seed, bias_rate: of the recipe.
    """

    what: str
    name: str
    source: str
    stage: int
    accumulation: int
    setting: str
    expert_parallel: int = 1
    kind: str = "moe"
    scope: str = "step"
    seed: int = 3
    bias_rate: float = 0.0

    @property
    def science(self) -> Recipe:
        return recipe(self.kind, self.scope, self.seed, self.bias_rate)

    @property
    def injected(self) -> str:
        """Where the made-up state of this run's model lies."""
        return f"{INJECTED}-{self.kind}-{self.seed}-{self.bias_rate:g}"

    @property
    def low_precision(self) -> bool:
        return self.setting.startswith("bf16")


def made_up(science) -> State:
    """A state that no training made: each tensor drawn from its kind and name, of the sizes that training knows."""
    shapes = {name: p.detach() for name, p in new_model(science).named_parameters()}

    def draw(kind, name, draw_one=torch.randn):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{kind} {name}".encode()))
        return draw_one(shapes[name].shape, generator=generator)

    master = {name: p + 0.02 * draw("master", name) for name, p in shapes.items()}
    averages = {kind: {n: master[n] + 0.02 * draw(kind, n) for n in shapes} for kind in DECAYS}
    # Gradients clipped to norm 0.5 are about 1e-3 an element.
    exp_avg = {name: 3e-4 * draw("exp_avg", name) for name in shapes}
    exp_avg_sq = {name: 1e-6 * (0.5 + draw("exp_avg_sq", name, torch.rand)) for name in shapes}
    generator = torch.Generator().manual_seed(5)
    loads = torch.rand(science.model.depth, science.model.num_experts, generator=generator).softmax(-1)
    biases = 0.01 * torch.randn(loads.shape, generator=generator)
    steered = list(biases) if science.balance.bias_rate else []
    return State(master, exp_avg, exp_avg_sq, averages, INJECTED_STEPS, list(loads), steered)


def tensors_by_kind(made: State) -> dict[str, dict[str, torch.Tensor]]:
    """As a checkpoint names them."""
    return {"master": made.master, "exp_avg": made.exp_avg, "exp_avg_sq": made.exp_avg_sq, **made.averages}


def buffers(made: State) -> dict[str, list[float]]:
    """The selection biases as a checkpoint holds them."""
    return {f"blocks.{layer}.moe.selection_bias": bias.tolist() for layer, bias in enumerate(made.selection_bias)}


@distributed.on_main
def write_injected(root: Path, made: State) -> None:
    """The state as a checkpoint of one rank with whole tensors, written without an engine."""
    shutil.rmtree(root, ignore_errors=True)
    store = Store(root)
    temporary = store.temporary(HALF, INJECTED)
    temporary.mkdir(parents=True)
    found = tensors_by_kind(made)
    pieces = [Piece(kind, n, tuple(t.shape), 0, t.flatten()) for kind, named in found.items() for n, t in named.items()]
    write_shard(temporary, 0, pieces)
    plain = {
        "optimizer_steps": made.optimizer_steps,
        "loss_scaler": {},
        "previous_load": [load.tolist() for load in made.previous_load],
        "buffers": buffers(made),
    }
    store.commit(temporary, HALF, 1, plain)


def other_bits(reader, made: State) -> list[str]:
    """States in a checkpoint whose bits are not the made-up ones, counters and loads included."""
    found = tensors_by_kind(made)
    assert reader.kinds == found.keys(), (reader.kinds, found.keys())
    assert reader.shapes.keys() == made.master.keys()
    bad = [
        f"{kind} {name}"
        for kind, named in found.items()
        for name, tensor in named.items()
        if not torch.equal(reader.whole(name, kind).view(torch.int32), tensor.view(torch.int32))
    ]
    if reader.state["optimizer_steps"] != made.optimizer_steps:
        bad.append("optimizer_steps")
    if reader.state["previous_load"] != [load.tolist() for load in made.previous_load]:
        bad.append("previous_load")
    if reader.state["buffers"] != buffers(made):
        bad.append("selection_bias")
    return bad


def save(root: Path, run: Run):
    """What the run holds now, as a checkpoint of this layout; read back."""
    if distributed.is_main():
        shutil.rmtree(root, ignore_errors=True)
    distributed.barrier()
    saver = saver_in(root)
    begin(saver, run)
    assert saver.finish()
    return newest_whole(Store(root))


def later(truth: Trained, steps: int) -> Trained:
    """An unbroken run without its first steps."""
    images = steps * GLOBAL
    chosen = Decisions(truth.choices.first + images, truth.choices.chosen[images:], truth.choices.gap[images:])
    return Trained(truth.losses[steps:], truth.norms[steps:], truth.weights, truth.averages, chosen, truth.biases)


def play(folder: Path, move: Move, truth: Trained, plain: Trained | None) -> dict:
    """One cell: differences of the curve from the bare loop, and names of states that lost bits.

    plain: of a bf16 layout the bare loop in bf16, whose own distance from the truth is `plain_rms`.
    """
    steps = STEPS_OF[move.what]
    config = {"expert_parallel": move.expert_parallel} | settings(move.setting, move.stage)
    run = new_run(move.science, move.stage, move.accumulation, False, steps=steps, **config)
    bad = []
    if move.what != "first":
        reader = newest_whole(Store(folder / (move.source or move.injected)))
        state.load(run.engine, run.ema, reader)
        again = save(folder / f"{move.name}-again", run)
        bad = differing(reader, again) if move.source else other_bits(again, made_up(move.science))
        bad += [key for key in state.plain_state(run.engine) if reader.state[key] != again.state[key]]
    losses, norms = take_steps(run, steps)
    if move.what == "first":
        save(folder / move.name, run)
    figures = compare(finish(run, losses, norms, steps), truth)
    return figures | {"bad": sorted(set(bad)), "plain_rms": compare(plain, truth)["rms"] if plain else None}


@functools.cache
def bare(what: str, kind: str, scope: str, seed: int, bias_rate: float, precision: str) -> Trained:
    """What the bare loop makes of a run, in the steps that `what` takes."""
    science, dtype = recipe(kind, scope, seed, bias_rate), DTYPES[precision]
    if what == "inject":
        return train_plain(science, dtype, steps=CONTINUED, start=made_up(science))
    if what == "first":
        return train_plain(science, dtype, steps=BEFORE)
    return later(train_plain(science, dtype), HALF)


def main():
    distributed.initialize(distributed.discover(os.environ), Device("cpu"))
    skip_shm_op()
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write_lease(folder)
    moves = [Move(*values) for values in json.loads(sys.argv[2])]
    for place, science in {move.injected: move.science for move in moves if move.what == "inject"}.items():
        write_injected(folder / place, made_up(science))
    distributed.barrier()
    # All before the first engine: ZeRO-3 puts its own F.linear in place for the rest of the process.
    truths = [bare(move.what, *move[-4:], "fp32") for move in moves]
    plains = [bare(move.what, *move[-4:], "bf16") if move.low_precision else None for move in moves]
    for move, truth, plain in zip(moves, truths, plains, strict=True):
        line = play(folder, move, truth, plain)
        if distributed.is_main():
            print("CELL " + json.dumps({"cell": move, **line}), flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
