"""`python -m dsmoe doctor --ds_report`: DeepSpeed's own table with a row of ours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe.base.errors import ConfigError
from dsmoe.ops import native
from dsmoe.training import ds_report

ROOT = Path(__file__).resolve().parents[2]


def test_deepspeeds_report_has_our_row_with_the_state_of_the_compiled_file():
    command = [sys.executable, "-m", "dsmoe", "doctor", "--no-measure", "--ds_report"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    plain = re.sub(r"\x1b\[\d+m", "", done.stdout)
    (row,) = (line for line in plain.splitlines() if line.startswith(ds_report.NAME))
    state = ("[YES]", "[OKAY]") if native.LIBRARY.loaded else ("[NO]", "[NO]")
    assert re.search(rf"{re.escape(state[0])} \.+ {re.escape(state[1])}$", row), row
    assert "DeepSpeed C++/CUDA extension op report" in plain
    assert "op moe_ffn" in plain, "the doctor's own report comes first"


def test_load_gives_the_operations_or_says_why_there_are_none(monkeypatch):
    import torch

    builder = ds_report.builder()
    if native.LIBRARY.loaded:
        assert builder.is_compatible()
        assert builder.load() is torch.ops.dsmoe
    monkeypatch.setattr(native, "LIBRARY", native.library.load(Path("/nowhere/lib.so.1")))
    assert not builder.is_compatible(verbose=True)
    with pytest.raises(ConfigError, match="not built"):
        builder.load()
