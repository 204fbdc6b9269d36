"""What every section of the suite gets, and how time is taken on a device."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Settings:
    """device: "cuda" or "cpu"; quick: sizes that only show that the code runs; seconds: this section's budget; folder:
    where files beside the report go."""

    device: str
    quick: bool
    seconds: float
    folder: Path

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    def wait(self) -> None:
        """Until all work given to the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def median_seconds(call: Callable[[], object], settings: Settings, calls: int, samples: int = 5) -> float:
    """Median over samples of the mean of `calls` calls, after one that warms up. On a GPU by its own events."""
    call()
    settings.wait()
    found = []
    for _ in range(samples):
        if settings.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            settings.wait()
            found.append(begin.elapsed_time(end) / 1e3 / calls)
        else:
            begun = time.perf_counter()
            for _ in range(calls):
                call()
            found.append((time.perf_counter() - begun) / calls)
    return statistics.median(found)


def captured(call: Callable[[], object], settings: Settings) -> Callable[[], object]:
    """The call as one CUDA graph, so that launching costs no time; on a CPU the call itself."""
    if settings.device != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
