"""Shared set-up of the tests: import paths, and the number of tests that start processes."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
for entry in (str(ROOT), str(ROOT / "tests")):
    if entry not in sys.path:
        sys.path.insert(0, entry)

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
