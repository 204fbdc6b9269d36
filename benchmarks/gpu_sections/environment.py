"""What the figures were made with."""

import os
import platform
import subprocess
from collections.abc import Iterator

import torch
from moe_gpu_rivals import GPU_RIVALS, missing

from dsmoe import ops
from dsmoe.runtime.device import Device
from gpu_sections.settings import ROOT, Settings


def run(settings: Settings) -> Iterator[dict]:
    """One row a fact."""
    device = Device(settings.device)
    facts = {
        "device": device.name,
        "memory": f"{device.total_memory_bytes() / 2**30:.0f} GiB",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "python": platform.python_version(),
        "processors": str(os.cpu_count()),
        "commit": _output("git", "describe", "--always", "--dirty", "--exclude=*"),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": _output("nvcc", "--version").splitlines()[-1:],
        "kernels before the build": ops.kernels(),
        "rivals that are not here": ", ".join(f"{name} ({why})" for name in GPU_RIVALS if (why := missing(name))),
    }
    for fact, value in facts.items():
        yield {"fact": fact, "value": value if isinstance(value, str) else " ".join(value)}


def table(rows: list[dict], _: dict) -> list[str]:
    """Markdown."""
    return ["| | |", "|---|---|", *(f"| {row['fact']} | {row['value'] or '-'} |" for row in rows)]


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "not found"
    return done.stdout.strip()
