"""Shared set-up of the tests: import paths and thread count."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
for entry in (str(ROOT), str(ROOT / "tests")):
    if entry not in sys.path:
        sys.path.insert(0, entry)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not _gpu():
        pytest.skip("needs a GPU: torch sees none")


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()
