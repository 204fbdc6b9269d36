"""Builds the compiled operations for the GPU at hand alone; later sections load them."""

import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from gpu_sections.settings import ROOT, Settings


def run(settings: Settings) -> Iterator[dict]:
    """One row: what was built, in how many seconds. RuntimeError with the compiler's words when it fails."""
    options = ["--no-cuda"] if settings.device == "cpu" else ["--archs", architecture()]
    begun = time.perf_counter()
    command = [sys.executable, str(ROOT / "kernels/build.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr).strip()[-2000:])
    yield {"options": " ".join(options), "seconds": time.perf_counter() - begun, "line": done.stdout.strip()}


def architecture() -> str:
    """The GPU's, as nvcc names it; Hopper's own instructions need the "a"."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if major == 9 else "")


def table(rows: list[dict], _: dict) -> list[str]:
    """Markdown."""
    return [f"`kernels/build.py {row['options']}`: {row['line']}, {row['seconds']:.0f} s" for row in rows]
