"""The device of this process: what it computes, how fast, in how much memory. The only user of torch.cuda."""

import functools
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsmoe.base.errors import ConfigError, choose_from

KINDS = ("cpu", "cuda")

# Dense bf16/fp16 tensor-core peak in FLOP/s, NVIDIA datasheets (half the "with sparsity" figure). First match
# wins.
_DATASHEET_BF16 = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H200 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("B200", 2250e12),
)


@dataclass(frozen=True)
class Device:
    """One compute device: kind "cpu" or "cuda", and its index among those visible (0 on CPU)."""

    kind: str
    index: int = 0

    @classmethod
    def pick(cls, local_rank: int = 0, prefer: str | None = None) -> "Device":
        """The device of the process with this rank on its host.

        prefer: "cpu" or "cuda"; None follows DS_ACCELERATOR, else takes a GPU where there is one. With one
        visible GPU it is taken whatever the rank, since schedulers show each task its own. Raises ConfigError
        otherwise when the host shows fewer GPUs than ranks, or when "cuda" is asked for and absent.
        """
        if prefer is None:
            stated = os.environ.get("DS_ACCELERATOR")
            prefer = stated if stated in KINDS else ("cuda" if gpu_count() else "cpu")
        if prefer not in KINDS:
            raise ConfigError(choose_from("device", prefer, KINDS))
        if prefer == "cpu":
            return cls("cpu")
        count = gpu_count()
        if count == 0:
            raise ConfigError(
                "device 'cuda' was asked for but torch sees no GPU; use 'cpu', or check nvidia-smi "
                "and that this torch is a CUDA build."
            )
        if count > 1 and local_rank >= count:
            raise ConfigError(
                f"local rank {local_rank} has no GPU: {count} are visible; start at most {count} ranks on this host."
            )
        return cls("cuda", local_rank if count > 1 else 0)

    @property
    def torch_device(self) -> torch.device:
        """The same as a torch.device."""
        return torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", self.index)

    @property
    def name(self) -> str:
        """The maker's name, such as "NVIDIA H200"."""
        return torch.cuda.get_device_name(self.index) if self.kind == "cuda" else _processor_name()

    @property
    def backend(self) -> str:
        """The collective library: "gloo" or "nccl"."""
        return "nccl" if self.kind == "cuda" else "gloo"

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether training in this dtype works: fp16 not on CPU, bf16 on GPUs from compute capability 8.0."""
        if dtype == torch.float16:
            return self.kind == "cuda"
        if dtype == torch.bfloat16 and self.kind == "cuda":
            return torch.cuda.get_device_capability(self.index) >= (8, 0)
        return dtype in (torch.float32, torch.float64, torch.bfloat16)

    def make_current(self) -> None:
        """Make it the default of this process's CUDA calls."""
        if self.kind == "cuda":
            torch.cuda.set_device(self.index)

    def synchronize(self) -> None:
        """Wait until all work given to the device is done."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.index)

    def max_memory_bytes(self) -> int:
        """Most memory used so far: allocated tensors on GPU, resident memory on CPU (never falls)."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.index)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def reset_max_memory(self) -> None:
        """Start the GPU's peak anew; the CPU's cannot be."""
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats(self.index)

    def total_memory_bytes(self) -> int:
        """Memory of the device; physical memory of the host on CPU."""
        if self.kind == "cuda":
            return torch.cuda.get_device_properties(self.index).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def free_memory_bytes(self) -> int:
        """Memory that new tensors can take: of the GPU, with what torch keeps for them; of the whole host on CPU."""
        if self.kind == "cuda":
            kept = torch.cuda.memory_reserved(self.index) - torch.cuda.memory_allocated(self.index)
            return torch.cuda.mem_get_info(self.index)[0] + kept
        return host_free_bytes()

    def matmul_rate(self, dtype: torch.dtype, seconds: float = 0.3) -> float:
        """Measured rate of a large square matrix product, in FLOP/s, over about `seconds` after a warm-up."""
        side = 8192 if self.kind == "cuda" else 1024
        a = torch.ones(side, side, device=self.torch_device, dtype=dtype)
        b = torch.ones(side, side, device=self.torch_device, dtype=dtype)
        out = a @ b
        self.synchronize()
        calls, started, elapsed = 0, time.perf_counter(), 0.0
        while elapsed < seconds:
            torch.matmul(a, b, out=out)
            self.synchronize()
            calls, elapsed = calls + 1, time.perf_counter() - started
        return calls * 2.0 * side**3 / elapsed

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Datasheet dense peak in FLOP/s for bf16 and fp16 on known GPUs, else None."""
        if self.kind != "cuda" or dtype not in (torch.bfloat16, torch.float16):
            return None
        return datasheet_peak(self.name)


@dataclass(frozen=True)
class Pending:
    """Work under way on a stream of its own; none: it is done."""

    _made: Tensor | tuple[Tensor, ...] | None
    _stream: "torch.cuda.Stream | None" = None

    def result(self) -> Tensor | tuple[Tensor, ...] | None:
        """What it made. From here on the stream in use waits for it, not the host. Call it once."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for made in self._made if isinstance(self._made, tuple) else (self._made,):
                if made is not None:
                    made.record_stream(current)
        return self._made


def beside(work: Callable[..., Tensor | tuple[Tensor, ...] | None], *inputs: Tensor) -> Pending:
    """Start work(*inputs) beside what the caller does until it asks for the result: on a GPU on a side stream, which
    waits for what has been queued so far; on a CPU, and inside torch.compile, which orders kernels itself, at once.

    Autograd runs each gradient on the stream of its forward and makes streams wait for each other where tensors pass,
    so the gradient of `work` runs beside what does not need it. A CUDA graph captures the fork and the join.
    """
    device = inputs[0].device
    if device.type != "cuda" or torch.compiler.is_compiling():
        return Pending(work(*inputs))
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        made = work(*inputs)
    # Their memory must not be given to another tensor of their own stream before the side stream is through.
    for given in inputs:
        given.record_stream(side)
    return Pending(made, side)


@functools.cache
def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


def gpu_count() -> int:
    """GPUs that torch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def host_free_bytes() -> int:
    """Memory of the host that could be had without swapping; all of it where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return Device("cpu").total_memory_bytes()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def datasheet_peak(name: str) -> float | None:
    """Dense bf16/fp16 peak in FLOP/s of the GPU with this maker's name; None for one not in the table."""
    return next((peak for key, peak in _DATASHEET_BF16 if key in name), None)


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
