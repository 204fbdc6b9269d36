"""Run by every rank: injects one made-up state into many layouts, and moves runs from one layout to another.

injected_cells.py FOLDER CELLS, CELLS the JSON of a list of `Move`s; one JSON line a cell on rank 0. Everything is
compared with a bare torch loop (plain_loop) that starts from the same state, or from the beginning.
"""

import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from layout_cells import Run, compare, finish, new_run, take_steps
from plain_loop import DECAYS, GLOBAL, STEPS, State, Trained, new_model, recipe, train_plain
from router_choices import Decisions
from state_cells import begin, differing, saver_in, settings, write_lease

from dsmoe.checkpoint.choice import newest_whole
from dsmoe.checkpoint.manifest import Piece
from dsmoe.checkpoint.store import Store
from dsmoe.checkpoint.writer import write_shard
from dsmoe.runtime import distributed
from dsmoe.runtime.device import Device
from dsmoe.training import state
from dsmoe.training.deepspeed_patches import skip_shm_op

KIND, SCOPE = "moe", "step"
HALF = STEPS // 2
INJECTED, INJECTED_STEPS = "injected", 137
BEFORE, AFTER, CONTINUED = range(HALF), range(HALF, STEPS), range(HALF, HALF + STEPS)


class Move(NamedTuple):
    """A layout, and what happens in it.

    what: "inject" loads the made-up state, saves it again, and trains STEPS steps; "first" trains HALF steps from the
    beginning and saves FOLDER/name; "second" loads FOLDER/source, saves it again, and trains the other half.
    """

    what: str
    name: str
    source: str
    stage: int
    accumulation: int
    setting: str


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
    return State(master, exp_avg, exp_avg_sq, averages, INJECTED_STEPS, list(loads))


def tensors_by_kind(made: State) -> dict[str, dict[str, torch.Tensor]]:
    """As a checkpoint names them."""
    return {"master": made.master, "exp_avg": made.exp_avg, "exp_avg_sq": made.exp_avg_sq, **made.averages}


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
    return Trained(truth.losses[steps:], truth.norms[steps:], truth.weights, truth.averages, chosen)


def play(folder: Path, science, made: State, truths: dict[str, Trained], move: Move) -> dict:
    """One cell: differences of the curve from the bare loop, and names of states that lost bits."""
    steps = {"inject": CONTINUED, "first": BEFORE, "second": AFTER}[move.what]
    run = new_run(science, move.stage, move.accumulation, False, steps=steps, **settings(move.setting, move.stage))
    bad = []
    if move.what != "first":
        reader = newest_whole(Store(folder / (move.source or INJECTED)))
        state.load(run.engine, run.ema, reader)
        again = save(folder / f"{move.name}-again", run)
        bad = differing(reader, again) if move.source else other_bits(again, made)
        bad += [key for key in state.plain_state(run.engine) if reader.state[key] != again.state[key]]
    losses, norms = take_steps(run, steps)
    if move.what == "first":
        save(folder / move.name, run)
    return compare(finish(run, losses, norms, steps), truths[move.what]) | {"bad": sorted(set(bad))}


def main():
    distributed.initialize(distributed.discover(os.environ), Device("cpu"))
    skip_shm_op()
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write_lease(folder)
    science = recipe(KIND, SCOPE)
    made = made_up(science)
    write_injected(folder / INJECTED, made)
    distributed.barrier()
    # Before the first engine: ZeRO-3 puts its own F.linear in place for the rest of the process.
    truths = {
        "inject": train_plain(science, steps=CONTINUED, start=made),
        "first": train_plain(science, steps=BEFORE),
        "second": later(train_plain(science), HALF),
    }
    for move in (Move(*values) for values in json.loads(sys.argv[2])):
        line = play(folder, science, made, truths, move)
        if distributed.is_main():
            print("CELL " + json.dumps({"cell": move, **line}), flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
