"""The expert layer across four ranks equals all experts on one, whatever the tokens; the launch has a watchdog."""

import json
from pathlib import Path

import pytest
from distributed_harness import assert_succeeded, launch


@pytest.mark.distributed
def test_values_and_gradients_are_those_of_one_rank():
    ranks = launch([Path(__file__).with_name("expert_parallel_rank.py")], 4, timeout=120)
    assert_succeeded(ranks)
    for rank in ranks:
        cases = [json.loads(line[5:]) for line in rank.stdout.splitlines() if line.startswith("CASE ")]
        assert len(cases) == 2 * 2 * 5 * 2
        for *case, worst in cases:
            # float64 sums of at most 60 products of order 1 in another order.
            assert worst < 1e-12, (rank.rank, case, worst)
