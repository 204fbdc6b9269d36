"""The layer under DeepSpeed ZeRO-3 with zero.Init and recomputation, two ranks, against one plain process."""

import json
from pathlib import Path

import pytest
from distributed_harness import assert_succeeded, launch


@pytest.mark.distributed
def test_partitioned_training_follows_a_plain_loop_and_leaves_nothing_gathered(subtests):
    ranks = launch([Path(__file__).with_name("zero3_rank.py"), "swiglu", "gelu"], 2, preloaded=True)
    assert_succeeded(ranks)
    line = next(line for line in ranks[0].stdout.splitlines() if line.startswith("RESULT "))
    results = json.loads(line.removeprefix("RESULT "))
    assert results.keys() == {"swiglu", "gelu"}
    for kind, run in results.items():
        with subtests.test("the curve", kind=kind):
            assert run["float32"]["losses"] == pytest.approx(run["plain"], rel=1e-6)
            assert all(0 < loss < 10 for loss in run["bfloat16"]["losses"])
        for precision in ("float32", "bfloat16"):
            with subtests.test("what is held", kind=kind, precision=precision):
                assert run[precision]["held"] == {}
                is_float32, load = run[precision]["previous_load"]
                assert is_float32
                assert load == pytest.approx([1 / 3] * 3, rel=1e-7)
