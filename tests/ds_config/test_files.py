"""The ds_configs that ship: each states what it is for, suits the models it names, and trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe.base.presets import PRESETS
from dsmoe.base.recipe import load_recipe
from dsmoe.ds_config import check_policy, load_policy, resolve_batch
from dsmoe.ds_config.policy import RECIPE_KEYS

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {path.stem: path for path in sorted((ROOT / "ds_configs").glob("*.json"))}
EXPERTS_OVER = {name: load_policy(str(path)).block.expert_parallel_size for name, path in SHIPPED.items()}
ONE_PROCESS = [name for name, size in EXPERTS_OVER.items() if size == 1]
# What a file promises: a recipe that it is meant for, and numbers of ranks that it names.
MEANT_FOR = {
    "quickstart": ("quickstart", (1, 2)),
    "quickstart_ep2": ("quickstart", (2,)),
    "single_gpu_bf16": ("a4", (1,)),
    "zero3_offload_bf16": ("l2_8e2a_512", (1, 8)),
    "a6_zero3_bf16": ("a6", (4, 8, 16)),
    "l2_8e2a_zero3_bf16": ("l2_8e2a_512", (8, 16)),
}
ALL_BLOCKS_SHARDED = {"a6_zero3_bf16": "a6", "l2_8e2a_zero3_bf16": "L/2-8E2A"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_file_says_what_it_is_for_and_leaves_the_science_to_the_recipe(name):
    tree = json.loads(SHIPPED[name].read_text())
    assert len(tree["dsmoe"]["about"]) > 20
    assert {key: tree.get(key) for key in RECIPE_KEYS} == dict.fromkeys(RECIPE_KEYS, "auto")
    for experts in (0, 8) if name in ONE_PROCESS else (8,):
        check_policy(load_policy(str(SHIPPED[name])), device_type="cuda", num_experts=experts, world_size=8)


@pytest.mark.parametrize("name", MEANT_FOR)
def test_a_file_divides_the_batch_of_the_recipe_that_it_is_meant_for(name):
    recipe_name, worlds = MEANT_FOR[name]
    recipe, policy = load_recipe(recipe_name), load_policy(str(SHIPPED[name]))
    for world in worlds:
        check_policy(policy, device_type="cuda", num_experts=recipe.model.num_experts, world_size=world)
        batch = resolve_batch(policy, recipe.train.global_batch, world)
        assert batch.micro_batch * batch.accumulation * world == recipe.train.global_batch


@pytest.mark.parametrize("name", ALL_BLOCKS_SHARDED)
def test_stage_3_buckets_hold_a_block_of_the_model_that_the_file_names(name):
    """Prefetching less than a block stalls in each; every tensor must fit the reduce bucket."""
    spec, zero = PRESETS[ALL_BLOCKS_SHARDED[name]], json.loads(SHIPPED[name].read_text())["zero_optimization"]
    expert = 3 * spec.dim * spec.mlp_hidden
    feed_forward = spec.num_experts * expert + 3 * spec.dim * spec.shared_hidden if spec.is_moe else 8 * spec.dim**2
    block = 10 * spec.dim**2 + feed_forward
    assert block <= zero["stage3_prefetch_bucket_size"] < 1.2 * block
    assert block <= zero["reduce_bucket_size"]
    assert 3 * block <= zero["stage3_max_live_parameters"] < 4 * block


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Figures of every file that one process can run, from one that trains with each in turn."""
    script = Path(__file__).with_name("engine_files.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, script, *(str(SHIPPED[name]) for name in ONE_PROCESS)],
        capture_output=True, text=True, env=env, timeout=240, cwd=tmp_path_factory.mktemp("files"), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("FILE ")]
    return dict(zip(ONE_PROCESS, lines, strict=True))


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_a_tiny_model_trains_with_the_file_as_in_bare_torch(trained, name):
    """On a CPU, in one process: the layout is degenerate, the code path of stage, precision and offload is not."""
    found, policy = trained[name], load_policy(str(SHIPPED[name]))
    assert found["stage"] == policy.stage
    assert found["dtype"] == {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[policy.precision]
    assert found["accumulation"] == (2 if policy.micro_batch else 1)
    assert found["clipped"]
    # fp32: the design's invariance statement; bf16 keeps 8 bits, and five steps of lr 1e-2 amplify its rounding.
    assert found["losses"] == pytest.approx(found["bare"], rel=1e-6 if policy.precision == "fp32" else 2**-6)
    assert found["losses"][-1] < 0.9 * found["losses"][0], found["losses"]
    assert set(found["moved"]) >= {n for n in found["all"] if "final_layer" in n or "adaLN" in n}
