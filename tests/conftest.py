"""Shared set-up of the tests: import paths, no tuning file, and the number of tests that start processes."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
for entry in (str(ROOT), str(ROOT / "tests")):
    if entry not in sys.path:
        sys.path.insert(0, entry)

# What was measured on this machine must not decide which implementation a test, or a process that it starts, runs.
os.environ["DSMOE_TUNING"] = str(ROOT / "tests" / "no_tuning.json")

DISTRIBUTED_CASES = 35


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse to run when more than DISTRIBUTED_CASES tests start ranks."""
    found = sum(item.get_closest_marker("distributed") is not None for item in items)
    if found > DISTRIBUTED_CASES:
        limit = f"{found} tests are marked distributed, {DISTRIBUTED_CASES} are allowed"
        raise pytest.UsageError(f"{limit}; let one launch answer several questions (subtests).")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not _gpu():
        pytest.skip("needs a GPU: torch sees none")


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()
