"""Traffic of a step: rings walked rank by rank, and sums worked out by hand."""

import itertools

import pytest

from dsmoe.base.memory import Buckets, Layout, ModelShape
from dsmoe.base.presets import preset
from dsmoe.scaling.links import Cluster, LinkBytes, link_bytes

GIB = 1 << 30
SIZES = {"input_size": 32, "channels": 4, "num_classes": 1000, "learn_sigma": True}
DENSE = ModelShape(spec=preset("a4"), **SIZES)
MOE = ModelShape(spec=preset("L/2-8E2A"), **SIZES)
NOTHING_KEPT = Buckets(live=0)


def cluster(nodes, gpus):
    return Cluster(nodes, gpus, 80 * GIB)


def layout(stage, world, **more):
    return Layout(zero_stage=stage, world_size=world, precision="bf16", micro_batch=4, buckets=NOTHING_KEPT, **more)


def walk(groups, passed, gpus):
    """(inside, between) bytes a rank sends on average when every rank passes `passed` bytes to the next in its ring."""
    inside = between = 0.0
    for group in groups:
        for here, there in itertools.pairwise([*group, group[0]]):
            if here // gpus == there // gpus:
                inside += passed
            else:
                between += passed
    ranks = sum(len(group) for group in groups)
    return inside / ranks, between / ranks


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 8), (2, 4), (4, 8), (3, 1)])
@pytest.mark.parametrize(("stage", "passes"), [(0, 2), (1, 3), (2, 3), (3, 3)])
def test_a_dense_step_is_so_many_passes_of_a_ring(nodes, gpus, stage, passes):
    """all-reduce 2; + all-gather 1; stage 3: two all-gathers and a reduce-scatter (ZeRO paper, section 7)."""
    world = nodes * gpus
    found = link_bytes(DENSE, layout(stage, world), cluster(nodes, gpus))
    passed = passes * 2 * DENSE.count.trained * (world - 1) / world
    inside, between = walk([list(range(world))], passed, gpus)
    assert found.node == pytest.approx(inside)
    assert found.network == pytest.approx(between)
    assert found.host == 0


@pytest.mark.parametrize(("nodes", "gpus", "ep"), [(2, 8, 2), (2, 8, 8), (4, 4, 8), (2, 4, 4), (8, 1, 4), (1, 8, 8)])
def test_experts_are_exchanged_among_the_ranks_that_share_them(nodes, gpus, ep):
    world = nodes * gpus
    found = link_bytes(MOE, layout(1, world, expert_parallel_size=ep), cluster(nodes, gpus))
    routed = MOE.count.routed
    everyone = walk([list(range(world))], 3 * 2 * (MOE.count.trained - routed) * (world - 1) / world, gpus)
    sharing = [list(range(first, world, ep)) for first in range(ep)]
    experts = walk(sharing, 3 * 2 * (routed / ep) * (world // ep - 1) / (world // ep), gpus)
    # 4 images x 256 tokens x 2 choices x 1024 x bf16, 24 layers, dispatch and combine, forward and backward
    rows = 4 * 256 * 2 * 1024 * 2 * 24 * 4
    inside = between = 0.0
    for rank in range(world):
        for other in range(rank // ep * ep, rank // ep * ep + ep):
            if other != rank:
                if other // gpus == rank // gpus:
                    inside += rows / ep / world
                else:
                    between += rows / ep / world
    assert found.node == pytest.approx(everyone[0] + experts[0] + inside)
    assert found.network == pytest.approx(everyone[1] + experts[1] + between)


def test_accumulation_reduces_every_micro_step_from_stage_2_on():
    n, share = 2 * DENSE.count.trained, 7 / 8
    passes = {0: 2, 1: 2 + 1, 2: 4 * 2 + 1, 3: 4 * 3}
    for stage, count in passes.items():
        found = link_bytes(DENSE, layout(stage, 8, accumulation=4), cluster(1, 8))
        assert found.node == pytest.approx(count * n * share)


def test_what_stage_3_keeps_is_gathered_once():
    half = Buckets(live=DENSE.count.trained)
    at = Layout(zero_stage=3, world_size=8, precision="bf16", micro_batch=4, buckets=half)
    assert link_bytes(DENSE, at, cluster(1, 8)).node == pytest.approx(2.5 * 2 * DENSE.count.trained * 7 / 8)


def test_recompute_dispatches_tokens_again():
    plain, again = (
        link_bytes(MOE, layout(1, 8, expert_parallel_size=8, activation_checkpointing=on), cluster(1, 8)).node
        for on in (False, True)
    )
    rows = 4 * 256 * 2 * 1024 * 2 * 24
    assert again - plain == pytest.approx(2 * rows * 7 / 8)


def test_offload_sends_the_shard_to_the_host_and_back():
    n = DENSE.count.trained // 8
    assert link_bytes(DENSE, layout(1, 8, offload_optimizer=True), cluster(1, 8)).host == n * (4 + 2)
    found = link_bytes(DENSE, layout(2, 8, offload_optimizer=True, accumulation=3), cluster(1, 8)).host
    assert found == n * (4 + 2 + 2 * 2 * 2)


def test_the_busiest_link_weighs_bytes_by_bandwidth():
    at = Cluster(2, 8, 80 * GIB, node_bandwidth=400, network_bandwidth=50, host_bandwidth=60)
    assert LinkBytes(node=70, network=10).busiest(at) == "network"
    assert LinkBytes(node=90, network=10).busiest(at) == "node"
    assert LinkBytes(node=90, network=10, host=20).busiest(at) == "host"
    assert LinkBytes().busiest(at) == ""
