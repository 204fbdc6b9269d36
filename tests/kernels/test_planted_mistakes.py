"""The emulated tests can fail: each of these mistakes in a kernel is caught by one of them."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import emulation
import planted
import pytest

FAMILY_OF = {m.check: m.family for m in planted.MISTAKES}


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str | None]:
    """How each mistake was caught, by name; and each check without a mistake, by the check's name."""
    if emulation.compiler() is None:
        pytest.skip("no g++: the CUDA kernels cannot be emulated")
    with ThreadPoolExecutor(2) as pool:
        sound = {family: pool.submit(planted.built, family, None) for family in set(FAMILY_OF.values())}
        broken = {m.name: pool.submit(planted.built, m.family, m) for m in planted.MISTAKES}
    runs = {check: (sound[family], check) for check, family in FAMILY_OF.items()}
    runs |= {m.name: (broken[m.name], m.check) for m in planted.MISTAKES}
    words = [f"{library.result()}:{check}" for library, check in runs.values()]
    done = subprocess.run([sys.executable, planted.__file__, *words], capture_output=True, text=True, check=True)
    return dict(zip(runs, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("check", FAMILY_OF)
def test_the_check_passes_without_a_mistake(verdicts, check):
    assert verdicts[check] is None


@pytest.mark.parametrize("mistake", planted.MISTAKES, ids=lambda m: m.name)
def test_it_is_caught(verdicts, mistake):
    assert verdicts[mistake.name] is not None
    print(verdicts[mistake.name])
