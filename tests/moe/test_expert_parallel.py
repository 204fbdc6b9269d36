"""The expert layer across four ranks equals all experts on one, whatever the tokens; the launch has a watchdog."""

import json
from pathlib import Path

import pytest
from distributed_harness import assert_succeeded, launch


@pytest.mark.distributed
def test_values_and_gradients_are_those_of_one_rank(subtests):
    ranks = launch([Path(__file__).with_name("expert_parallel_rank.py")], 4, timeout=120, preloaded=True)
    assert_succeeded(ranks)
    seen, wrong = [], []
    for rank in ranks:
        cases = [json.loads(line[5:]) for line in rank.stdout.splitlines() if line.startswith("CASE ")]
        assert len(cases) == 2 * 3 * 7 * 2
        # float64 sums of at most 60 products of order 1 in another order.
        wrong += [(rank.rank, *case) for case in cases if not case[-1] < 1e-12]
        seen += cases
    assert not wrong
    # What the cases are for was met, under both sizes and every kind of expert.
    for size in (2, 4):
        for kind in ("swiglu", "gelu", "top-1"):
            found = [met for s, k, _, _, met, _ in seen if (s, k) == (size, kind)]
            with subtests.test("met", ranks=size, kind=kind):
                check_met(kind, found)


def check_met(kind, found):
    assert any(met["idle here"] for met in found)
    assert any(met["no tokens"] and not met["nothing arrives"] for met in found)
    assert any(met["nothing arrives"] and not met["no tokens"] for met in found)
    lone = {"swiglu": 6, "gelu": 6, "top-1": 7}[kind]
    assert {lone, 8} <= {met["idle everywhere"] for met in found}, "all tokens to one choice, or none at all"
