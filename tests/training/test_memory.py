"""What the engine keeps from step to step is what base.memory counts, tensor by tensor (one process, unit size).

Peaks, activations and several ranks are measured by benchmarks/memory.py.
"""

import json
from pathlib import Path

import pytest
from distributed_harness import assert_succeeded, launch

CELLS = Path(__file__).with_name("memory_cells.py")


@pytest.mark.distributed
def test_live_tensors_between_steps_are_those_that_are_counted(tmp_path, subtests):
    ranks = launch([CELLS, tmp_path], 1, preloaded=True)
    assert_succeeded(ranks)
    cells = [json.loads(line[5:]) for line in ranks[0].stdout.splitlines() if line.startswith("CELL ")]
    assert len(cells) == 5
    for cell in cells:
        with subtests.test(cell=cell["cell"]):
            # Not counted: position embedding, frequencies and the noise schedule's tables, 0.12 MB here at any stage.
            assert 0 <= cell["live"] - cell["kept"] < 130_000, cell
            assert cell["kept"] > 20 * cell["parameters"] - 1, cell
