"""Device code without a device: nvcc's report on each kernel, and its machine code (SASS)."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import emulation

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
BUILDS = emulation.ROOT / "build" / "kernel_device_code"


class Usage(NamedTuple):
    """What ptxas reports of one kernel."""

    registers: int
    spilled: int  # bytes stored and loaded
    stack: int


def nvcc() -> str | None:
    """The CUDA compiler, or None."""
    return shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc")


def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: from PATH, beside nvcc, from NVIDIA's own wheel (nvidia-cuda-nvdisasm) or triton's; or
    None."""
    places = [shutil.which(name)]
    if nvcc():
        places.append(str(Path(nvcc()).resolve().parent / name))
    for package, folder in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for root in (spec and spec.submodule_search_locations) or ():
            places += [str(path) for path in sorted(Path(root).glob(f"{folder}/{name}"))]
    return next((p for p in places if p and os.access(p, os.X_OK)), None)


def compiled(family: str, architecture: str) -> tuple[Path, dict[str, Usage]]:
    """The cubin of NAME.cu, made unless the same sources were before, and what each kernel uses."""
    folder = BUILDS / f"{emulation.source_hash()}-{architecture}"
    cubin, report = folder / f"{family}.cubin", folder / f"{family}.txt"
    if not report.exists():
        folder.mkdir(parents=True, exist_ok=True)
        source = emulation.SOURCES / "cuda" / f"{family}.cu"
        words = [
            nvcc(),
            "-std=c++17",
            "-O3",
            f"-arch={architecture}",
            "-cubin",
            "-Xptxas",
            "-v",
            str(source),
            "-o",
            str(cubin),
        ]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        unfinished = folder / f"{family}.{os.getpid()}"
        unfinished.write_text(done.stderr, encoding="utf-8")
        unfinished.replace(report)
    return cubin, parse_usage(report.read_text(encoding="utf-8"))


def parse_usage(report: str) -> dict[str, Usage]:
    """ptxas -v output by mangled kernel name."""
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        registers = re.search(r"Used (\d+) registers", part)[1]
        found[part[: part.index("'")]] = Usage(int(registers), int(stores) + int(loads), int(stack))
    return found


def machine_code(cubin: Path) -> dict[str, list[str]]:
    """Instructions (with operands) of each kernel, by mangled name."""
    disassembler = tool("nvdisasm") or tool("cuobjdump")
    words = [disassembler, *(["-c"] if disassembler.endswith("nvdisasm") else ["-sass"]), str(cubin)]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    code: dict[str, list[str]] = {}
    for line in text.splitlines():
        if name := re.search(r"\.text\.(\w+),|Function : (\w+)", line):
            current = code.setdefault(name[1] or name[2], [])
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            current.append(instruction[1])
    return code
