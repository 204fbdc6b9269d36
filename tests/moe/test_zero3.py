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
def test_partitioned_training_follows_a_plain_loop(results):
    for kind, run in results.items():
        assert run["float32"]["losses"] == pytest.approx(run["plain"], rel=1e-6), kind
        assert all(0 < loss < 10 for loss in run["bfloat16"]["losses"]), kind


@pytest.mark.distributed
def test_nothing_stays_gathered_and_the_load_keeps_its_precision(results):
    for kind, run in results.items():
        for precision in ("float32", "bfloat16"):
            assert run[precision]["held"] == {}, (kind, precision)
            is_float32, load = run[precision]["previous_load"]
            assert is_float32, (kind, precision)
            assert load == pytest.approx([1 / 3] * 3, rel=1e-7)
