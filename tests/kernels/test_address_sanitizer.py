"""The emulated kernels under the address sanitizer: reads past an input, which guard bands cannot see."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import emulation
import planted
import pytest

HERE = Path(__file__).resolve().parent
# One case of each kernel and number format is enough here; the values are judged by the plain build.
CASES = (
    "test_forward and (64-72-64 or 193-320 or 150-30-8 or 66-35 or 1-8-1 or 100-96-20)"
    " or test_backward and (64-72-64 or 150-30-8) and given3"
    " or test_gather and (34-301 or 33-128 or 96-256)"
    " or test_sum and (34-301 or 33-128) and (used2 or used3)"
    " or test_sum_backward and (34-301 or 33-128) and (wanted1 or wanted4)"
    " or test_forward_and_backward and (counts3 or counts5 or counts6) and (used1 or used4)"
    " or test_forward_and_backward and (2-7-72 or 2-18-301)"
    " or unaligned or no_tokens"
    " or test_gathered and (33-1-2-1 or 1-4-4)"
)
READ_PAST_THE_WEIGHTS = planted.Mistake(
    "a weight row too many", "route", "route_product.cuh", "if (e < shape.experts) load8", "load8", "route_few"
)
READ_PAST_THE_ORDER = planted.Mistake(
    "the slot of a row past the end", "grouped_glu", "grouped_tiles.cuh",
    "const int row = r < end ?", "const int row = r <= end ?", "glu_exact"
)  # fmt: skip


def environment() -> dict[str, str]:
    """With the sanitizer's library loaded first; skips, by name, where there is none."""
    if emulation.compiler() is None:
        pytest.skip("no g++: the CUDA kernels cannot be emulated")
    library = emulation.address_sanitizer()
    if library is None:
        pytest.skip("no libasan: the CUDA kernels cannot be run under the address sanitizer")
    options = "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=1"
    return os.environ | {"LD_PRELOAD": library, "ASAN_OPTIONS": options, "OMP_NUM_THREADS": "1"}


def test_no_access_outside_the_tensors():
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-k", CASES]
    words += [str(HERE / f"test_{family}.py") for family in emulation.FAMILIES]
    done = subprocess.run(words, env=environment(), cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    assert "AddressSanitizer" not in done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 40, done.stdout[-500:]


@pytest.mark.parametrize("mistake", [READ_PAST_THE_WEIGHTS, READ_PAST_THE_ORDER], ids=lambda m: m.name)
def test_a_read_past_an_input_is_found(mistake):
    env = environment() | {"PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent), str(HERE.parents[1])))}
    library = planted.built(mistake.family, mistake, sanitize=True)
    words = [sys.executable, planted.__file__, f"{library}:{mistake.check}"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert "heap-buffer-overflow" in (json.loads(done.stdout)[0] or ""), done.stdout
