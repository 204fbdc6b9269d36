"""Run by one rank: bytes of every tensor that is alive between two steps, in every ZeRO stage and precision.

Prints one JSON line a cell: the live bytes found by the garbage collector, and those that base.memory expects to stay.
"""

import gc
import json
import os
import sys
import warnings
from pathlib import Path

import torch

from benchmarks.memory import SHAPE, new_run
from dsmoe.base.memory import Buckets, Layout, ModelShape, rank_memory
from dsmoe.base.presets import ModelSpec
from dsmoe.ds_config import write_policy
from dsmoe.runtime import distributed
from dsmoe.runtime.device import Device
from dsmoe.training.deepspeed_patches import skip_shm_op
from dsmoe.training.loop import take_step

SPEC = ModelSpec(depth=1, dim=128, heads=2, num_experts=4, shared_ratio=2.0)
CELLS = [("fp32", 0), ("fp32", 1), ("fp32", 3), ("bf16", 2), ("bf16", 3)]


def live_bytes():
    """Storages of all tensors that Python knows, each once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules with deprecated attributes are looked at on the way
        tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(storages.values())


def cell(folder, precision, stage):
    layout = Layout(
        zero_stage=stage,
        world_size=1,
        precision=precision,
        micro_batch=2,
        averages=2,
        buckets=Buckets(reduce=50_000),
    )
    config = Path(folder) / "cell.json"
    write_policy(config, layout, "a test")
    before = live_bytes()
    run = new_run(str(config), SPEC, 2, 2)
    for step in range(2):
        take_step(run, step)
        run.ema.update()
    shape = ModelShape(spec=SPEC, **SHAPE)
    found = {
        "cell": [precision, stage],
        "live": live_bytes() - before,
        "kept": sum(rank_memory(shape, layout).kept.values()),
        "parameters": shape.count.trained,
    }
    run.watch.close()
    run.engine.engine.destroy()
    return found


def main():
    distributed.initialize(distributed.discover(os.environ), Device("cpu"))
    skip_shm_op()
    for precision, stage in CELLS:
        print("CELL " + json.dumps(cell(sys.argv[1], precision, stage)), flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
