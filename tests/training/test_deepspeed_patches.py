"""The patches against DeepSpeed itself: a process group made by dsmoe.runtime, then an engine, and nothing compiled."""

import json
from types import SimpleNamespace

import pytest
import torch
from distributed_harness import assert_succeeded, launch

from dsmoe.training import deepspeed_patches as patches

ENGINE = """
import os
import torch
from dsmoe.runtime import distributed
from dsmoe.runtime.device import Device
place = distributed.discover(os.environ)
distributed.initialize(place, Device.pick(place.local_rank))
import deepspeed
from deepspeed.comm.torch import build_shm_op
from dsmoe.training.deepspeed_patches import skip_shm_op
# The patch reaches into a private table: a DeepSpeed that renames the entry must be noticed.
assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is True
skip_shm_op()
skip_shm_op()
assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
assert build_shm_op() is None
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
}
engine, *_ = deepspeed.initialize(model=model, config=config)
x = torch.full((1, 4), float(place.rank + 1))
before = [p.detach().clone() for p in model.parameters()]
engine.backward(engine(x).sum())
engine.step()
weight = next(iter(model.parameters())).detach()
assert not torch.equal(weight, before[0])
assert all(torch.equal(weight, other) for other in distributed.all_gather_tensor(weight))
distributed.shutdown()
"""


@pytest.mark.distributed
def test_an_engine_starts_on_our_process_group_and_compiles_nothing(tmp_path, subtests):
    script = tmp_path / "ranks.py"
    script.write_text(ENGINE)
    # Two ranks that import DeepSpeed after the group is made, as training does, and one that had it before.
    for world_size in (2, 1):
        with subtests.test(ranks=world_size):
            extensions = tmp_path / f"extensions{world_size}"
            env = {"TORCH_EXTENSIONS_DIR": str(extensions)}
            assert_succeeded(launch([script], world_size, timeout=120, env=env, preloaded=world_size == 1))
            assert not extensions.exists() or not list(extensions.iterdir())


def test_the_reduction_of_one_rank_alone_is_found_under_these_names():
    """That it trains as bare torch is held by test_layouts (stages 0, 3) and the ds_configs' test_files (stage 1)."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert callable(DeepSpeedZeroOptimizer.buffered_reduce_fallback)
    assert callable(DeepSpeedZeroOptimizer_Stage3._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads)
    optimizer = SimpleNamespace(buffered_reduce_fallback=None)
    engine = SimpleNamespace(enable_backward_allreduce=True, optimizer=optimizer, zero_optimization_stage=lambda: 1)
    patches.skip_lone_reduction(engine)
    assert optimizer.buffered_reduce_fallback(None, [], "dtype", elements_per_buffer=1) is None
    assert engine.enable_backward_allreduce, "stage 1 needs the call that flattens the gradients"
    engine.zero_optimization_stage = lambda: 0
    patches.skip_lone_reduction(engine)
    assert not engine.enable_backward_allreduce


STORAGE = """
import json, os
import torch
from dsmoe.runtime import distributed
from dsmoe.runtime.device import Device
place = distributed.discover(os.environ)
distributed.initialize(place, Device.pick(place.local_rank))
from dsmoe.training.deepspeed_patches import skip_shm_op
from dsmoe.training.engine import MASTER, Engine
skip_shm_op()

def storage(tensor):
    return tensor.untyped_storage().data_ptr()

for stage in (1, 2, 3):
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(40, 64), torch.nn.Linear(64, 3))
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.5, "steps_per_print": 10**9,
                  "zero_optimization": {"stage": stage, "reduce_bucket_size": 20000}}
        if precision == "bf16":
            config["bf16"] = {"enabled": True}
        engine = Engine(model, torch.optim.AdamW(model.parameters(), lr=0.1), config)
        joined, optimizer = [], engine.engine.optimizer
        flatten = optimizer.flatten
        optimizer.flatten = lambda tensors: joined.append(flatten(tensors)) or joined[-1]
        x = torch.full((1, 40), float(place.rank + 1), dtype=engine.dtype)
        engine.backward(engine(x).float().sum())
        engine.step()
        if stage == 3:
            stored, masters = optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat
            in_place = [storage(t) == storage(optimizer.grad_partitions_flat_buffer) for t in joined]
        else:
            stored, masters = optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups
            in_place = [True]
        shared = [storage(a) == storage(b) for a, b in zip(masters, stored, strict=True)]
        linked = all(storage(f.tensor) in map(storage, masters) for f in engine.fragments(MASTER))
        if stage < 3:
            linked &= all(storage(p._hp_mapping.hp_fragment) in map(storage, masters)
                          for p in model.parameters() if p._hp_mapping is not None)
        if place.rank == 0:
            cell = {"stage": stage, "precision": precision, "shared": shared, "linked": linked, "in_place": in_place}
            print("CELL " + json.dumps(cell), flush=True)
        engine.engine.destroy()
distributed.shutdown()
"""


@pytest.mark.distributed
def test_fp32_weights_lie_in_memory_once_and_stage_3_steps_on_its_gradient_buffer(tmp_path, subtests):
    script = tmp_path / "ranks.py"
    script.write_text(STORAGE)
    results = launch([script], 2, timeout=120, preloaded=True)
    assert_succeeded(results)
    cells = [json.loads(line[5:]) for line in results[0].stdout.splitlines() if line.startswith("CELL ")]
    assert len(cells) == 6
    for cell in cells:
        with subtests.test(stage=cell["stage"], precision=cell["precision"]):
            assert set(cell["shared"]) == {cell["precision"] == "fp32"}, cell
            assert cell["linked"], f"DeepSpeed's views are of other memory than the masters: {cell}"
            assert cell["in_place"]
            assert all(cell["in_place"]), f"gradients were copied to join them: {cell}"


def test_tensors_in_a_row_are_joined_without_a_copy_and_others_with_one():
    buffer = torch.arange(10.0)
    joined = patches._flat(torch.cat, [buffer[2:5], buffer[5:6], buffer[6:9]])
    assert torch.equal(joined, buffer[2:9])
    assert joined.data_ptr() == buffer[2:].data_ptr()
    apart = {"a gap": [buffer[:2], buffer[3:5]], "out of order": [buffer[5:6], buffer[2:5]]}
    apart["other memory"] = [buffer[:2], torch.arange(2.0, 4.0)]
    for name, tensors in apart.items():
        copy = patches._flat(torch.cat, tensors)
        assert torch.equal(copy, torch.cat(tensors)), name
        assert copy.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr(), name
