"""Training under DeepSpeed equals a bare torch loop, whatever the ZeRO stage, ranks and accumulation."""

import json
from pathlib import Path

import pytest
from distributed_harness import assert_succeeded, launch

SCRIPT = Path(__file__).with_name("layout_cells.py")
CELLS = [
    # kind, balance scope, ZeRO stage, accumulation, activation checkpointing
    ("moe", "sample", 0, 1, False),
    ("moe", "sample", 1, 1, False),
    ("moe", "sample", 2, 2, False),
    ("moe", "sample", 3, 1, True),
    ("moe", "step", 1, 2, True),
    ("gelu", "sample", 3, 2, False),
    ("dense", "none", 1, 1, False),
    ("dense", "none", 2, 1, True),
]


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
def test_every_layout_trains_as_one_process(world):
    results = launch([SCRIPT, json.dumps(CELLS)], world, timeout=240)
    assert_succeeded(results)
    cells = [json.loads(line[5:]) for line in results[0].stdout.splitlines() if line.startswith("CELL ")]
    assert [tuple(c["cell"]) for c in cells] == CELLS
    for cell in cells:
        # Design, invariance statement: 1e-6 on losses, 1e-5 on norms and parameters.
        assert cell["loss"] < 1e-6, cell
        assert cell["norm"] < 1e-5, cell
        assert cell["weights"] < 1e-5, cell
        assert cell["average"] < 1e-5, cell
        assert cell["moved"] > 1e-2, "the run did not move the average; the comparison would show nothing"
        assert cell["clipped"] > 0, "no step was clipped; the comparison would not cover clipping"
        share = 1 if cell["cell"][2] == 0 else world
        assert cell["own"] <= -(-cell["all"] // share) * 1.1 + 1000, "the average is not sharded as the parameters"
