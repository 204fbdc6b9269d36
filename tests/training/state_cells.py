"""Run by every rank: saves and loads checkpoints across layouts. state_cells.py FOLDER CELLS, one JSON line a cell.

A cell is [name, source, kind, scope, stage, accumulation, setting]; scope "bias" balances by a selection bias. Without
a source it trains HALF steps, saves FOLDER/name, trains on to the end and leaves losses and final weights there as the
reference. With one it loads FOLDER/source, saves what it holds again for a comparison bit by bit, and trains the second
half.
"""

import json
import os
import sys
from pathlib import Path

import torch
from layout_cells import largest, new_run, relative, take_steps, whole_state
from plain_loop import DECAYS, STEPS, recipe
from safetensors.torch import load_file, save_file

from dsmoe.base.run_folder import Lease, RunFolder
from dsmoe.checkpoint.choice import newest_whole
from dsmoe.checkpoint.saver import Saver
from dsmoe.checkpoint.store import Store
from dsmoe.runtime import distributed
from dsmoe.runtime.device import Device
from dsmoe.training import state
from dsmoe.training.deepspeed_patches import skip_shm_op

HALF = STEPS // 2
ZERO = {"reduce_bucket_size": 20000, "stage3_prefetch_bucket_size": 20000}
SETTINGS = {
    "fp32": {},
    "persistent": {"zero_optimization": {**ZERO, "stage3_param_persistence_threshold": 500}},
    "sub_groups": {"zero_optimization": {**ZERO, "stage3_param_persistence_threshold": 0, "sub_group_size": 3000}},
    "persistent_sub_groups": {
        "zero_optimization": {**ZERO, "stage3_param_persistence_threshold": 500, "sub_group_size": 3000}
    },
    "ep2": {"expert_parallel": 2},
    "bf16": {"bf16": {"enabled": True}},
    "bf16_ep2": {"bf16": {"enabled": True}, "expert_parallel": 2},
    "bf16_accumulate_fp32": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "offload": {
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {**ZERO, "offload_optimizer": {"device": "cpu"}, "stage3_param_persistence_threshold": 0},
    },
}


def settings(name, stage):
    config = json.loads(json.dumps(SETTINGS[name]))
    if "zero_optimization" in config:
        config["zero_optimization"]["stage"] = stage
    return config


def saver_in(root):
    root.mkdir(exist_ok=True)
    return Saver(Store(root), Lease(RunFolder(root.parent), 1, "test-holder"), 1)


def begin(saver, run):
    saver.begin(HALF, state.local_pieces(run.engine, run.ema), state.plain_state(run.engine), 1 << 20)


def differing(one, other):
    """Names of states that are not the same bits in two readers."""
    names = [(kind, name) for kind in sorted(one.kinds) for name in one.shapes]
    assert one.kinds == other.kinds == {"master", "exp_avg", "exp_avg_sq", *DECAYS}
    assert one.shapes == other.shapes
    return [f"{k} {n}" for k, n in names if not torch.equal(one.whole(n, k), other.whole(n, k))]


def reference_cell(folder, name, science, stage, accumulation, setting):
    run = new_run(science, stage, accumulation, False, **settings(setting, stage))
    first = take_steps(run, range(HALF))
    root = folder / name
    saver = saver_in(root)
    begin(saver, run)
    second = take_steps(run, range(HALF, STEPS))  # the thread writes meanwhile
    assert saver.finish()
    weights, averages = whole_state(run)
    if distributed.is_main():
        save_file(weights, root / "weights.safetensors")
        for kind, average in averages.items():
            save_file(average, root / f"{kind}.safetensors")
        (root / "second.json").write_text(json.dumps(second))
    run.engine.engine.destroy()
    return {"losses": first[0] + second[0]}


def resumed_cell(folder, name, source, science, stage, accumulation, setting):
    run = new_run(science, stage, accumulation, False, steps=range(HALF, STEPS), **settings(setting, stage))
    reader = newest_whole(Store(folder / source))
    state.load(run.engine, run.ema, reader)
    again = newest_whole(Store(save_again(folder, name, run)))
    found = {
        "differing": differing(reader, again),
        "plain_equal": all(reader.state[key] == again.state[key] for key in state.plain_state(run.engine)),
    }
    losses, norms = take_steps(run, range(HALF, STEPS))
    truth = json.loads((folder / source / "second.json").read_text())
    weights, averages = whole_state(run)
    run.engine.engine.destroy()
    return found | {
        "loss": largest(abs(a - b) / abs(b) for a, b in zip(losses, truth[0], strict=True)),
        "norm": largest(abs(a - b) / b for a, b in zip(norms, truth[1], strict=True)),
        "weights": relative(weights, load_file(folder / source / "weights.safetensors")),
        "average": largest(
            relative(average, load_file(folder / source / f"{kind}.safetensors")) for kind, average in averages.items()
        ),
        "steps": reader.state["optimizer_steps"],
        "wrote": reader.state["ranks"],
    }


def save_again(folder, name, run):
    root = folder / f"{name}-again"
    saver = saver_in(root)
    begin(saver, run)
    assert saver.finish()
    return root


def write_lease(folder):
    """What every Saver of this script looks for before it commits."""
    if distributed.is_main():
        (folder / "lease.json").write_text(json.dumps({"generation": 1, "holder": "test-holder"}))


def main():
    distributed.initialize(distributed.discover(os.environ), Device("cpu"))
    skip_shm_op()
    folder = Path(sys.argv[1])
    write_lease(folder)
    for name, source, kind, scope, stage, accumulation, setting in json.loads(sys.argv[2]):
        science = recipe(kind, "none", bias_rate=0.002) if scope == "bias" else recipe(kind, scope)
        if source:
            cell = resumed_cell(folder, name, source, science, stage, accumulation, setting)
        else:
            cell = reference_cell(folder, name, science, stage, accumulation, setting)
        if distributed.is_main():
            print("CELL " + json.dumps({"name": name, **cell}), flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
