"""The CUDA kernels as a host library: built by g++ from kernels/csrc/cuda, cached by source hash, called by ctypes.

Arguments of every launcher are taken from launchers.h, the only description of the interface.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels" / "csrc"
BUILDS = ROOT / "build" / "kernel_emulation"
FLAGS = ("-std=c++17", "-g1", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
SANITIZE = ("-fsanitize=address", "-fno-omit-frame-pointer")
FAMILIES = ("route", "rows", "activation", "modulate", "grouped_glu", "grouped_dglu")
TYPES = {"int": ctypes.c_int, "int64_t": ctypes.c_int64}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def compiler() -> str | None:
    """The host compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def address_sanitizer() -> str | None:
    """The compiler's library of it, or None."""
    if compiler() is None:
        return None
    command = [compiler(), "-print-file-name=libasan.so"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return str(Path(found).resolve()) if Path(found).is_absolute() else None


def source_hash(sources: Path = SOURCES, *words: str) -> str:
    """Of the CUDA sources, the emulation and these words."""
    digest = hashlib.sha256(" ".join(words).encode())
    for path in sorted(p for part in ("cuda", "emulation") for p in (sources / part).rglob("*")):
        if path.suffix in (".cu", ".cuh", ".h"):
            digest.update(path.relative_to(sources).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def build(
    sources: Path = SOURCES, families: tuple[str, ...] = FAMILIES, sanitize: bool = False, optimize: bool = True
) -> Path:
    """The shared library of these families (NAME.cu), compiled unless the same sources were before.

    optimize: pays where the library runs for more than a few seconds.
    """
    flags = (*FLAGS, "-O1" if optimize else "-O0", *(SANITIZE if sanitize else ()))
    folder = BUILDS / source_hash(sources, *flags, *families, str(compiler()))
    library = folder / "libdsmoe_emulated.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)

    def run(*words: str) -> None:
        done = subprocess.run([compiler(), *flags, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]

    def compile_family(name: str) -> str:
        target = folder / f"{name}.{os.getpid()}.o"
        run("-c", "-x", "c++", str(sources / "cuda" / f"{name}.cu"), "-o", str(target))
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_family, families))
    unfinished = folder / f"unfinished.{os.getpid()}"
    run("-shared", *objects, "-o", str(unfinished), "-pthread")
    unfinished.replace(library)
    for target in objects:
        os.unlink(target)
    return library


@cache
def prototypes() -> dict[str, tuple[type, list[type]]]:
    """(return type, argument types) of each function in launchers.h."""
    header = re.sub(r"//.*", "", (SOURCES / "cuda" / "launchers.h").read_text(encoding="utf-8"))
    found = {}
    for result, name, arguments in re.findall(r"(int|int64_t) DSMOE_SYM\((\w+)\)\(([^)]*)\);", header):
        words = [" ".join(a.split()) for a in arguments.split(",") if a.strip()]
        found[name] = TYPES[result], [ctypes.c_void_p if "*" in w else TYPES[w.split()[0]] for w in words]
    return found


class Library:
    """dsmoe_NAME_emu functions as methods by NAME; tensors, None and numbers as arguments."""

    def __init__(self, path: Path):
        self._functions = ctypes.CDLL(str(path))

    def configure(self, schedule: int, os_threads: int = 1) -> None:
        """schedule 0: threads of a block in order, 1: reversed, 2: in order, one warp ahead; above: by that seed."""
        self._functions.dsmoe_emu_configure(schedule, os_threads)

    def call(self, name: str, *arguments: object) -> int:
        """What the function returned."""
        result, types = prototypes()[f"dsmoe_{name}"]
        function = getattr(self._functions, f"dsmoe_{name}_emu")
        function.restype, function.argtypes = result, types
        assert len(arguments) == len(types), f"{name} takes {len(types)} arguments, got {len(arguments)}"
        return function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


class Memory:
    """Output tensors, poisoned, between guard bands that must stay as they are.

    Under the address sanitizer there are no bands: it watches the exact allocation.
    """

    GUARD = 256  # bytes on either side

    def __init__(self, offset: int = 0):
        """offset: elements by which every tensor is moved off its 16-byte alignment."""
        self._offset = offset
        self._whole: list[tuple[Tensor, int, int]] = []
        self._guard = 0 if "asan" in os.environ.get("LD_PRELOAD", "") else self.GUARD

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of NaN, or of -7 for whole numbers."""
        size = torch.empty((), dtype=dtype).element_size()
        start = self._guard + self._offset * size
        count = torch.Size(shape).numel()
        whole = torch.full((start + count * size + self._guard,), 0xAB, dtype=torch.uint8)
        out = whole[start : start + count * size].view(dtype).view(shape)
        out.fill_(float("nan") if dtype.is_floating_point else -7)
        self._whole.append((whole, start, start + count * size))
        return out

    def scratch(self, count: int) -> Tensor:
        """Aligned bytes with unhelpful contents."""
        whole = torch.full((self._guard + count + self._guard,), 0xFF, dtype=torch.uint8)
        self._whole.append((whole, self._guard, self._guard + count))
        return whole[self._guard : self._guard + count]

    def verify(self) -> None:
        """Fails when a byte outside the tensors has changed."""
        for whole, start, end in self._whole:
            if self._guard:
                assert (whole[:start] == 0xAB).all() or (whole[:start] == 0xFF).all(), "a write before the output"
                assert (whole[end:] == 0xAB).all() or (whole[end:] == 0xFF).all(), "a write past the output"
