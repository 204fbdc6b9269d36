"""The patches against DeepSpeed itself: a process group made by dsmoe.runtime, then an engine, and nothing compiled."""

from types import SimpleNamespace

import pytest
from distributed_harness import assert_succeeded, launch

from dsmoe.training.deepspeed_patches import skip_lone_reduction

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
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_engine_starts_on_our_process_group_and_compiles_nothing(tmp_path, world_size):
    script = tmp_path / "ranks.py"
    script.write_text(ENGINE)
    extensions = tmp_path / "extensions"
    results = launch([script], world_size, timeout=120, env={"TORCH_EXTENSIONS_DIR": str(extensions)})
    assert_succeeded(results)
    assert not extensions.exists() or not list(extensions.iterdir())


def test_the_reduction_of_one_rank_alone_is_found_under_these_names():
    """That it trains as bare torch is held by test_layouts (stage 0) and the ds_configs' test_files (stage 1)."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert callable(DeepSpeedZeroOptimizer.buffered_reduce_fallback)
    optimizer = SimpleNamespace(buffered_reduce_fallback=None)
    engine = SimpleNamespace(enable_backward_allreduce=True, optimizer=optimizer, zero_optimization_stage=lambda: 1)
    skip_lone_reduction(engine)
    assert optimizer.buffered_reduce_fallback(None, [], "dtype", elements_per_buffer=1) is None
    assert engine.enable_backward_allreduce, "stage 1 needs the call that flattens the gradients"
    engine.zero_optimization_stage = lambda: 0
    skip_lone_reduction(engine)
    assert not engine.enable_backward_allreduce
