"""What this machine and environment offer, for `python -m dsmoe doctor`. Reports, changes nothing.

Packages are looked up by their metadata, not imported, so a broken one cannot stop the report.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable

import torch

from dsmoe.runtime import extension_cache
from dsmoe.runtime.device import Device, gpu_count

# Distribution name, and what goes without it.
_PACKAGES = (
    ("deepspeed", "no training"),
    ("diffusers", "no Stable Diffusion codec"),
    ("pyarrow", "no parquet data"),
    ("mpi4py", "not needed: mpirun is understood without it"),
    ("apex", "not needed: fused optimizers come from torch and DeepSpeed"),
    ("megatron-core", "not needed: its permutation can be preferred (dsmoe.ops in a ds_config), and tests compare"),
)
# Operation, implementation in use, all that serve the device.
OpChoice = tuple[str, str, tuple[str, ...]]
_NOT_FOUND = "not found"


def report(
    implementations: Callable[[str], Iterable[OpChoice]], kernels: str, measure: bool = True
) -> list[tuple[str, str]]:
    """Lines (topic, finding) about Python, torch, devices, packages, compilers, operations and the extension cache.

    implementations: device kind -> the choice for each operation; `dsmoe.ops.implementations`, a floor above this one.
    kernels: state of the compiled operations; `dsmoe.ops.kernels()`.
    measure: also time a matrix product on each device (0.3 s each).
    """
    lines = [
        ("python", f"{platform.python_version()} at {sys.executable}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"),
    ]
    devices = [Device("cuda", index) for index in range(gpu_count())] or [Device("cpu")]
    lines += [("device", _describe(device, measure)) for device in devices]
    lines.append(("processors", f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads"))
    lines += [(name, _package(name, without)) for name, without in _PACKAGES]
    lines += [
        (label, _command(command)) for label, command in (("compiler", "g++"), ("nvcc", "nvcc"), ("ninja", "ninja"))
    ]
    lines.append(("kernels", kernels))
    for name, chosen, available in implementations(devices[0].kind):
        lines.append((f"op {name}", f"{chosen} (of {', '.join(available)})"))
    cache = extension_cache.folder(os.environ)
    lines.append(("extensions", f"{cache}{'' if cache.exists() else ' (empty)'}"))
    lines += [("stale lock", lock.advice()) for lock in extension_cache.stale_locks(cache)]
    return lines


def _describe(device: Device, measure: bool) -> str:
    memory = f"{device.total_memory_bytes() / 2**30:.0f} GiB"
    dtypes = [
        str(t).removeprefix("torch.") for t in (torch.float32, torch.bfloat16, torch.float16) if device.supports(t)
    ]
    parts = [f"{device.kind} {device.name}", memory, " ".join(dtypes)]
    for dtype in (torch.float32, torch.bfloat16) if measure else ():
        if device.supports(dtype):
            name = str(dtype).removeprefix("torch.")
            parts.append(f"{name} matmul {device.matmul_rate(dtype) / 1e12:.3g} TFLOP/s")
    peak = device.peak_flops(torch.bfloat16)
    if peak is not None:
        parts.append(f"datasheet bf16 peak {peak / 1e12:.0f} TFLOP/s")
    return ", ".join(parts)


def _package(name: str, without: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{_NOT_FOUND} ({without})"


def _command(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        return _NOT_FOUND
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path}, which does not run ({error})"
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    version = next((line for line in lines if "release" in line), lines[0] if lines else "")
    return f"{path}: {version}"
