"""Where the real samples lie, for tests that need them."""

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]


def require(*parts: str) -> Path:
    """Path of a real sample; skips the test with the reason when it is not on this machine."""
    base = Path(os.environ.get("DSMOE_SHARED_DATA", _ROOT.parent / "shared" / "data"))
    path = base.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real sample {'/'.join(parts)} is absent (set DSMOE_SHARED_DATA to the sample folder)")
    return path
