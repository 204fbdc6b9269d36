"""The layer under DeepSpeed ZeRO-3 with zero.Init and recomputation, two ranks, against one plain process."""

import json
from pathlib import Path

import pytest
from distributed_harness import assert_succeeded, launch


@pytest.fixture(scope="module")
def results():
    ranks = launch([Path(__file__).with_name("zero3_rank.py"), "swiglu", "gelu"], 2)
    assert_succeeded(ranks)
    line = next(line for line in ranks[0].stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_partitioned_training_follows_a_plain_loop(results, kind):
    run = results[kind]
    assert run["float32"]["losses"] == pytest.approx(run["plain"], rel=1e-6)
    assert all(0 < loss < 10 for loss in run["bfloat16"]["losses"])


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_nothing_stays_gathered_and_the_load_keeps_its_precision(results, kind):
    for precision in ("float32", "bfloat16"):
        run = results[kind][precision]
        assert run["held"] == {}
        is_float32, load = run["previous_load"]
        assert is_float32
        assert load == pytest.approx([1 / 3] * 3, rel=1e-7)
