"""The compiled operations: found, checked and loaded once, when `dsmoe.ops` is imported.

On import and not at the first call, because a call may be traced by torch.compile. Loading declares torch operations
`dsmoe::...`; nothing runs.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmoe.base.kernel_build import COMMAND, PRODUCT, SOURCES, built_of, source_hash


@dataclass(frozen=True)
class Library:
    """What was found. problem: why nothing was loaded, None when it was. digest: hash of the sources it was built of.
    archs: GPU architectures in it ("90a"); isa: instruction set of the CPU kernels on this processor."""

    path: Path
    problem: str | None
    digest: str = ""
    archs: tuple[str, ...] = ()
    isa: str = ""

    @property
    def loaded(self) -> bool:
        return self.problem is None

    def describe(self) -> str:
        """One line for people."""
        if not self.loaded:
            return f"{self.problem}; reference operations run"
        sources = "these sources" if source_hash() == self.digest else "sources that are not here"
        gpu = " ".join(f"sm_{arch}" for arch in self.archs) or "none"
        return f"{self.path.name} of {sources} ({self.digest}), CPU {self.isa}, GPU {gpu}"


def load(path: Path = PRODUCT, sources: Path = SOURCES) -> Library:
    """Load the file, if it is there and of the sources beside it: other kernels may mean otherwise."""
    if not path.exists():
        return Library(path, f"not built ({COMMAND})")
    built = built_of(path)
    if built is None:
        return Library(path, f"{path.name} does not say what it was built of; {COMMAND}")
    digest, archs = built
    expected = source_hash(sources)
    if expected not in (None, digest):
        return Library(path, f"{path.name} is of other sources ({digest}, here {expected}); {COMMAND}", digest, archs)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        return Library(path, f"{path.name} does not load ({cause}); {COMMAND}", digest, archs)
    isa = ctypes.CDLL(str(path)).dsmoe_cpu_isa
    isa.restype = ctypes.c_char_p
    return Library(path, None, digest, archs, isa().decode())
