"""Builds the emulated kernels once; skips, by name, without a compiler."""

import os
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)


@pytest.fixture(scope="session")
def library():
    import emulation

    if emulation.compiler() is None:
        pytest.skip("no g++: the CUDA kernels cannot be emulated")
    sanitize = "asan" in os.environ.get("LD_PRELOAD", "")
    return emulation.Library(emulation.build(sanitize=sanitize, optimize=not sanitize))


@pytest.fixture
def kernels(library):
    import calls

    library.configure(0)
    return calls.Kernels(library)
