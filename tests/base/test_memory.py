"""Memory of a rank: against published and hand-computed numbers, the model's own tensors, and what must not change."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from dsmoe.base.activations import saved_by_block, saved_outside_blocks
from dsmoe.base.memory import Buckets, Layout, ModelShape, rank_memory
from dsmoe.base.presets import PRESETS, preset
from dsmoe.models.dit import DiT

GIB = 1 << 30
STATES = ("parameters", "gradients", "master weights", "moments", "averages")


def shape(name, **changes):
    sizes = {"input_size": 32, "channels": 4, "num_classes": 1000, "learn_sigma": True}
    return ModelShape(spec=preset(name), **(sizes | changes))


def layout(stage, world, precision="bf16", micro=1, **more):
    return Layout(zero_stage=stage, world_size=world, precision=precision, micro_batch=micro, **more)


def states_at_the_end(name, at):
    """What stays plus all gradients, without buffers and activations."""
    found = rank_memory(shape(name), at).phases["backward ends"]
    return {part: found[part] for part in STATES}


@pytest.mark.parametrize("name", PRESETS)
def test_tensors_are_those_of_the_model(name):
    with torch.device("meta"):
        model = DiT(PRESETS[name], input_size=32, in_channels=4, num_classes=1000, learn_sigma=True)
    routed = [p.numel() for n, p in model.named_parameters() if ".moe.experts." in n]
    others = [p.numel() for n, p in model.named_parameters() if ".moe.experts." not in n]
    mine = shape(name)
    assert sorted(mine.tensors()) == sorted(others)
    assert mine.expert_tensors() * mine.spec.depth == routed
    assert sum(others) + sum(routed) == mine.count.trained


def test_zero_papers_sixteen_bytes_a_parameter():
    """ZeRO (Rajbhandari 2020) section 3.1: fp16 weights 2, gradients 2, fp32 weights 4, moments 8; ours is bf16."""
    one = layout(1, 1, averages=0)
    n = shape("a6").count.trained
    assert sum(states_at_the_end("a6", one).values()) == 16 * n


@pytest.mark.parametrize(
    ("stage", "bytes_a_parameter"),
    # Table 1 of the paper: P_os, P_os+g, P_os+g+p with K = 12 on 8 ranks; an average adds 4 to K.
    [(1, 2 + 2 + 16 / 8), (2, 2 + (2 + 16) / 8), (3, (2 + 2 + 16) / 8)],
)
def test_zero_papers_stages_on_eight_ranks(stage, bytes_a_parameter):
    at = layout(stage, 8, buckets=Buckets(reduce=1, persistent=0))
    found = sum(states_at_the_end("a6", at).values())
    mine = shape("a6")
    working = 2 * 2 * max(mine.tensors()) if stage > 1 else 0  # the gradient being made, larger than the tiny bucket
    assert found - working == pytest.approx(bytes_a_parameter * mine.count.trained, rel=1e-6)


# GiB a GPU on 8 GPUs, bf16, one average, worked out by hand from the parameter counts 1,862.6 M and 2,823.5 M.
BY_HAND = {
    ("a6", 1): {"parameters": 3.47, "gradients": 3.47, "master weights": 0.87, "moments": 1.73, "averages": 0.87},
    ("a6", 3): {"parameters": 0.43, "master weights": 0.87, "moments": 1.73, "averages": 0.87},
    ("L/2-8E2A", 1): {"parameters": 5.26, "gradients": 5.26, "master weights": 1.31, "moments": 2.63, "averages": 1.31},
    ("L/2-8E2A", 3): {"parameters": 0.66, "master weights": 1.31, "moments": 2.63, "averages": 1.31},
}


@pytest.mark.parametrize(("name", "stage"), BY_HAND)
def test_states_of_the_papers_models_on_eight_gpus(name, stage):
    found = states_at_the_end(name, layout(stage, 8))
    for part, expected in BY_HAND[name, stage].items():
        assert found[part] / GIB == pytest.approx(expected, abs=0.01), part


def test_experts_are_divided_and_their_optimizer_is_spread_over_the_ranks_that_share_them():
    """L/2-8E2A, 8 ranks, ep 4: a quarter of the routed weights a rank, each on 2 ranks that share the moments."""
    mine = shape("L/2-8E2A")
    routed, dense = mine.count.routed, mine.count.trained - mine.count.routed
    found = states_at_the_end("L/2-8E2A", layout(1, 8, expert_parallel_size=4))
    assert found["parameters"] == 2 * (dense + routed // 4)
    assert found["moments"] == pytest.approx(8 * (dense / 8 + (routed / 4) / 2), abs=8)


def test_only_low_precision_and_offload_keep_a_master_copy():
    """training.deepspeed_patches.share_fp32_weights; tests/training/test_memory.py counts the tensors."""
    count = shape("nano").count.trained
    for stage in range(4):
        found = rank_memory(shape("nano"), layout(stage, 2, "fp32"))
        assert found.kept["master weights"] == 0
        if stage:
            assert rank_memory(shape("nano"), layout(stage, 2)).kept["master weights"] == 4 * -(-count // 2)
            offloaded = rank_memory(shape("nano"), layout(stage, 2, "fp32", offload_optimizer=True))
            assert offloaded.host["master weights"] == 4 * -(-count // 2)


def test_offload_moves_the_optimizer_to_the_host():
    plain, offloaded = (rank_memory(shape("a6"), layout(2, 8, offload_optimizer=on)) for on in (False, True))
    n = shape("a6").count.trained
    assert "moments" not in offloaded.peak
    # master 4, moments 8, average 4, fp32 gradients 4, weights on their way back 2, and one tensor of staging
    staging = 2 * max(shape("a6").tensors())
    assert offloaded.host_bytes == pytest.approx(22 * n / 8 + staging, abs=64)
    assert plain.host == {}
    assert offloaded.device_bytes < plain.device_bytes


def test_averages_are_counted():
    one, three = (rank_memory(shape("a4"), layout(1, 1, averages=count)) for count in (1, 3))
    assert three.peak["averages"] == 3 * one.peak["averages"]


def test_activations_are_the_blocks_and_the_rest():
    mine, at = shape("B/2"), layout(1, 1, micro=8)
    sizes = {"images": 8, "tokens": 256, "itemsize": 2}
    outside = saved_outside_blocks(mine.spec, channels=4, out_channels=8, **sizes)
    block = saved_by_block(mine.spec, **sizes)
    assert rank_memory(mine, at).phases["backward begins"]["activations"] == 12 * block + outside
    recomputed = rank_memory(mine, dataclasses.replace(at, activation_checkpointing=True))
    stream = 2 * 8 * 256 * 768
    assert recomputed.phases["backward begins"]["activations"] == 12 * stream + block + outside


@pytest.mark.parametrize("spread", [1, 8])
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_experts_are_there_for_one_block_only(compiled, spread):
    """Between nothing and whole blocks; a block's own inside comes back while it is at work."""
    mine = shape("L/2-8E2A")
    at = layout(1, 8, micro=8, compiled_ops=compiled, expert_parallel_size=spread)
    ways = [
        rank_memory(mine, dataclasses.replace(at, activation_checkpointing=way)) for way in (True, "experts", False)
    ]
    blocks, experts, nothing = (found.phases["backward begins"]["activations"] for found in ways)
    assert blocks < experts < nothing
    tokens, hidden, shared = 8 * 256, mine.spec.mlp_hidden, mine.spec.shared_hidden
    # Elements a token, of two choices. Without expert parallelism the shared expert is inside, and the reference makes
    # the rows themselves again.
    inside = {
        (False, 1): 2 * (4 * hidden + 1024) + 4 * shared,
        (False, 8): 2 * 4 * hidden,
        (True, 1): 2 * 2 * hidden + 2 * shared,
        (True, 8): 2 * 3 * hidden,
    }
    assert nothing - experts == 23 * 2 * tokens * inside[compiled, spread]


def test_the_compiled_block_makes_all_gradients_of_a_layers_experts_at_once():
    mine = shape("L/2-8E2A")
    one, all_ = (rank_memory(mine, layout(1, 1, micro=2, compiled_ops=on)) for on in (False, True))
    matrix = 2 * 8 * 1024 * 4096
    gradients = [found.phases["backward begins"]["gradients"] for found in (one, all_)]
    assert gradients == [matrix, 3 * matrix]
    assert all_.kept == one.kept


def test_whole_model_at_the_start_can_be_the_fullest_moment():
    """Below stage 3 a rank makes the whole fp32 model: 66 GB for 16.5 B parameters, however many share it later."""
    whole = shape("G/2-16E2A")
    found = rank_memory(whole, layout(2, 64))
    assert found.peak_phase == "start"
    assert found.phases["start"]["whole fp32 model"] == 4 * whole.count.trained
    assert found.fullest_in_a_step != "start"


def test_stage_3_never_has_the_whole_model():
    whole = shape("G/2-16E2A")
    found = rank_memory(whole, layout(3, 64))
    # 16 experts of 3 matrices of 1408 x 5632, bf16, are the largest module, beside a 64th of the model.
    assert found.start_bytes == 2 * -(-whole.count.trained // 64) + 2 * 16 * 3 * 1408 * 5632
    assert found.peak_phase != "start"


def test_live_parameters_bound_what_stage_3_gathers():
    """The writer's 100 M keep half of it between two uses; DeepSpeed's default of 1e9 keeps the whole of a4."""
    gathered = [
        rank_memory(shape("a4"), layout(3, 8, buckets=Buckets(live=live))).phases["backward begins"]
        for live in (100_000_000, 1_000_000_000)
    ]
    largest, persistent = max(shape("a4").tensors()), sum(n for n in shape("a4").tensors() if n < 100_000)
    assert gathered[0]["gathered parameters"] == 2 * (50_000_000 + 2 * 20_000_000 + largest + persistent)
    assert gathered[1]["gathered parameters"] == 2 * (shape("a4").count.trained + 20_000_000)


def test_more_of_anything_never_needs_less():
    for name in ("S/2", "S/2-8E2A"):
        for stage in (1, 2, 3):
            sizes = [rank_memory(shape(name), layout(stage, 4, micro=m)).device_bytes for m in (1, 2, 4, 8)]
            assert sizes == sorted(sizes)
            worlds = [rank_memory(shape(name), layout(stage, w, micro=8)).device_bytes for w in (64, 8, 2)]
            assert worlds == sorted(worlds)


def test_memory_does_not_import_torch(repo_root):
    code = "import sys, dsmoe.base.memory; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=repo_root, check=True, timeout=60)


def test_stage_0_copies_its_gradients_to_reduce_them_unless_it_is_alone():
    """engine.py, allreduce_bucket: all gradients up to 5e8 elements in one flat copy."""
    n = shape("a4").count.trained
    for world, copies in ((1, 0), (2, 1)):
        found = rank_memory(shape("a4"), layout(0, world, "fp32")).phases["reduction"]
        assert found["buckets"] == copies * 4 * n
