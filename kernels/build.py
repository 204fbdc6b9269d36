"""Builds the compiled operations: dsmoe/ops/native/libdsmoe_kernels.so.1, one for torch 2.11 to 2.13, any Python.

    python kernels/build.py [--no-cuda] [--archs 80 90a 100] [--optional] [--force]

The CPU part always, the CUDA part when nvcc is there; no GPU is needed. Nothing is done when the file is already of
these sources and parts. kernels/README.md says what goes into it.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's, whichever is installed

from dsmoe.base.kernel_build import MARK, PRODUCT, SOURCES, built_of, source_files, source_hash  # noqa: E402

OBJECTS = ROOT / "build" / "kernels"
ARCHS = ("80", "90a", "100")
TORCH_FLOOR = "0x020b000000000000"  # the stable ABI as of torch 2.11
# No fast-math: NaN and infinity must come through. What is allowed lets loops be vectorised.
_CXX_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-Wall", "-Wno-comment", "-Wno-maybe-uninitialized", "-Wno-uninitialized",
)  # fmt: skip
_NVCC_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden")
# Instruction sets of the CPU kernels on x86-64; elsewhere only the first, as the compiler's default.
_VARIANTS = {
    "base": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4",),
    "avx512bf16": ("-march=x86-64-v4", "-mavx512bf16"),
}


class BuildError(Exception):
    """One line for the user."""


@dataclass(frozen=True)
class Step:
    """One compiler call: source to object. The object's name is a hash of all that goes into it."""

    command: tuple[str, ...]
    source: Path

    def object(self, headers: bytes) -> Path:
        digest = hashlib.sha256(" ".join(self.command).encode() + headers + self.source.read_bytes())
        return OBJECTS / f"{self.source.stem}-{digest.hexdigest()[:16]}.o"


def main() -> int:
    arguments = _parser().parse_args()
    try:
        print(build(arguments.archs if not arguments.no_cuda else [], arguments.force))
    except BuildError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 0 if arguments.optional else 1
    return 0


def build(archs: list[str], force: bool = False) -> str:
    """Build what is missing; what was done, in one line. archs: of the CUDA part, none to leave it out."""
    compiler = _compiler()
    nvcc = shutil.which("nvcc") if archs else None
    if archs and nvcc is None:
        print("kernels: nvcc was not found: the CPU part only (GPUs run the reference operations)")
    archs, digest = (archs if nvcc and _cuda_sources() else []), source_hash()
    found = built_of()
    if not force and found and found[0] == digest and set(archs) <= set(found[1]):
        return f"kernels: {PRODUCT.relative_to(ROOT)} is up to date ({digest})"
    steps = _cpu_steps(compiler, digest, archs) + (_cuda_steps(nvcc, archs) if archs else [])
    headers = b"".join(path.read_bytes() for path in source_files() if path.suffix in (".h", ".cuh"))
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        objects = list(pool.map(lambda step: _compile(step, headers), steps))
    _link(compiler, objects, nvcc if archs else None)
    parts = "CPU and CUDA " + " ".join(f"sm_{arch}" for arch in archs) if archs else "CPU"
    return f"kernels: built {PRODUCT.relative_to(ROOT)} ({parts}; sources {digest})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--no-cuda", action="store_true", help="leave the CUDA part out")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), help=f"of the CUDA part (default {' '.join(ARCHS)})")
    parser.add_argument("--optional", action="store_true", help="exit 0 also when it cannot be built")
    parser.add_argument("--force", action="store_true", help="also when up to date")
    return parser


def _compiler() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return path
    raise BuildError(
        f"no C++ compiler ({named or 'g++, clang++ or c++'}); install one, or set CXX. Without the compiled operations "
        "everything runs on the reference ones, slower."
    )


def _torch_folder() -> Path:
    try:
        import torch
    except ImportError as error:
        raise BuildError(f"torch does not import ({error}); build in the environment that dsmoe runs in.") from error
    folder = Path(torch.__file__).parent
    if not (folder / "include" / "torch" / "csrc" / "stable" / "ops.h").exists():
        raise BuildError(
            f"torch {torch.__version__} has no stable-ABI headers in {folder / 'include'}; 2.11 is needed."
        )
    return folder


def _cpu_steps(compiler: str, digest: str | None, archs: list[str]) -> list[Step]:
    include = _torch_folder() / "include"
    torch_flags = (f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}")
    x86 = platform.machine() in ("x86_64", "AMD64")
    mark = f'-DDSMOE_BUILT="{MARK}{digest}|{" ".join(archs)}"'
    cpu = SOURCES / "cpu"
    torch_side = (*torch_flags, *(("-DUSE_CUDA",) if archs else ()))
    steps = [
        Step((compiler, *_CXX_FLAGS, *torch_side, mark), SOURCES / "ops.cpp"),
        Step((compiler, *_CXX_FLAGS, *torch_side), SOURCES / "grouped_ops.cpp"),
        Step((compiler, *_CXX_FLAGS, *torch_side), SOURCES / "glu_ops.cpp"),
        Step((compiler, *_CXX_FLAGS, *torch_flags), cpu / "launchers.cpp"),
        Step((compiler, *_CXX_FLAGS, *(("-DDSMOE_X86",) if x86 else ())), cpu / "select.cpp"),
    ]
    for name, flags in _VARIANTS.items() if x86 else [("base", ())]:
        steps.append(Step((compiler, *_CXX_FLAGS, *flags, f"-DDSMOE_ISA={name}"), cpu / "variant.cpp"))
    return steps


def _cuda_steps(nvcc: str, archs: list[str]) -> list[Step]:
    targets = [flag for arch in archs for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    return [Step((nvcc, *_NVCC_FLAGS, *targets), source) for source in _cuda_sources()]


def _cuda_sources() -> list[Path]:
    return sorted((SOURCES / "cuda").glob("*.cu"))


def _compile(step: Step, headers: bytes) -> Path:
    target = step.object(headers)
    if not target.exists():
        _run([*step.command, "-c", str(step.source), "-o", f"{target}.part"], step.source)
        os.replace(f"{target}.part", target)
    return target


def _link(compiler: str, objects: list[Path], nvcc: str | None) -> None:
    """Into a temporary file first: a running program may have the old one mapped."""
    libraries = _torch_folder() / "lib"
    # libtorch.so by force: in a CUDA build it brings the function that knows the current stream.
    link = ["-lc10", "-ltorch_cpu", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    if nvcc:
        link += [f"-L{_cuda_libraries(nvcc)}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    with tempfile.TemporaryDirectory(dir=PRODUCT.parent) as folder:
        made = Path(folder) / PRODUCT.name
        command = [compiler, "-shared", "-o", str(made), *map(str, objects), f"-L{libraries}", *link]
        _run([*command, "-Wl,--exclude-libs,ALL"], PRODUCT)
        os.replace(made, PRODUCT)


def _cuda_libraries(nvcc: str) -> Path:
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes += [Path(nvcc).resolve().parents[1], Path("/usr/local/cuda")]
    for home in homes:
        for folder in (home / "lib64", *sorted(home.glob("targets/*/lib")), home / "lib"):
            if (folder / "libcudart_static.a").exists():
                return folder
    raise BuildError("nvcc is there, but not libcudart_static.a; set CUDA_HOME, or build with --no-cuda.")


def _run(command: list[str], what: Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        print(result.stderr[-4000:], file=sys.stderr)
        raise BuildError(f"{Path(command[0]).name} failed on {what.relative_to(ROOT)} (its messages stand above)")


if __name__ == "__main__":
    sys.exit(main())
