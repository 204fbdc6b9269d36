"""Device choice with a pretended number of GPUs, and what can be measured on a CPU."""

import contextlib
import functools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dsmoe.base.errors import ConfigError
from dsmoe.runtime import device as device_module
from dsmoe.runtime.device import Device, beside, datasheet_peak


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes the process believe in that many GPUs."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return lambda count: monkeypatch.setattr(device_module, "gpu_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "local_rank", "prefer", "expected"),
    [
        (0, 0, None, Device("cpu")),
        (0, 3, None, Device("cpu")),
        (4, 3, None, Device("cuda", 3)),
        (4, 3, "cpu", Device("cpu")),
        (4, 0, "cuda", Device("cuda", 0)),
        # The scheduler shows each task its own GPU only.
        (1, 3, None, Device("cuda", 0)),
    ],
)
def test_pick(gpus, count, local_rank, prefer, expected):
    gpus(count)
    assert Device.pick(local_rank, prefer) == expected


def test_pick_follows_the_users_accelerator(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert Device.pick(1) == Device("cpu")
    assert Device.pick(1, "cuda") == Device("cuda", 1)


@pytest.mark.parametrize(
    ("count", "local_rank", "prefer", "told"),
    [(0, 0, "cuda", "sees no GPU"), (2, 2, None, "local rank 2 has no GPU: 2 are visible"), (0, 0, "tpu", "cpu, cuda")],
)
def test_pick_refuses(gpus, count, local_rank, prefer, told):
    gpus(count)
    with pytest.raises(ConfigError, match=told):
        Device.pick(local_rank, prefer)


def test_backends_and_torch_devices():
    assert (Device("cpu").backend, Device("cuda", 2).backend) == ("gloo", "nccl")
    assert Device("cuda", 2).torch_device == torch.device("cuda:2")
    assert Device("cpu").torch_device == torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "works"),
    [(torch.float32, True), (torch.float64, True), (torch.bfloat16, True), (torch.float16, False), (torch.int8, False)],
)
def test_dtypes_of_the_cpu(dtype, works):
    assert Device("cpu").supports(dtype) is works


def test_peak_memory_sees_an_allocation():
    cpu = Device("cpu")
    before = cpu.max_memory_bytes()
    block = torch.ones(before // 4 + 100_000_000 // 4)
    grown = cpu.max_memory_bytes() - before
    # The old peak may have been above the present use, by at most itself; pages are counted in whole.
    assert 50_000_000 < grown <= block.numel() * 4 + 100_000_000
    assert cpu.total_memory_bytes() > cpu.max_memory_bytes()
    assert 0 < cpu.free_memory_bytes() < cpu.total_memory_bytes()


def test_matmul_rate_agrees_with_numpys():
    side = 1024
    a = np.ones((side, side), dtype=np.float32)
    a @ a
    started = time.perf_counter()
    for _ in range(5):
        a @ a
    numpys = 5 * 2 * side**3 / (time.perf_counter() - started)
    ours = Device("cpu").matmul_rate(torch.float32, seconds=0.2)
    # Other library, other thread count, a loaded machine: the order of magnitude is what a wrong count would miss.
    assert numpys / 20 < ours < numpys * 20


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_datasheet_peaks(name, peak):
    assert datasheet_peak(name) == peak


def test_the_cpu_has_no_datasheet_peak():
    assert Device("cpu").peak_flops(torch.bfloat16) is None
    assert Device("cpu").name


@pytest.mark.gpu
def test_gpu_measures():
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    gpu = Device.pick(0, "cuda")
    gpu.make_current()
    gpu.reset_max_memory()
    torch.ones(1 << 20, device=gpu.torch_device)
    assert gpu.max_memory_bytes() >= 4 << 20
    rate = gpu.matmul_rate(torch.bfloat16)
    peak = gpu.peak_flops(torch.bfloat16)
    assert rate > 1e12
    assert peak is None or rate < peak


class FakeStreams:
    """Stands in for torch.cuda's streams: notes who waits for whom, and on which stream work is queued."""

    def __init__(self, monkeypatch):
        self.events = []
        self.main = self.current = self.stream("main")
        device_module._side_stream.cache_clear()
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.stream("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.within)

    def stream(self, name):
        wait = lambda other: self.events.append(f"{name} waits for {other.name}")  # noqa: E731
        return SimpleNamespace(name=name, device=torch.device("cuda", 0), wait_stream=wait)

    @contextlib.contextmanager
    def within(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def tensor(self, name):
        note = lambda stream: self.events.append(f"{name} is kept for {stream.name}")  # noqa: E731
        return SimpleNamespace(name=name, device=torch.device("cuda", 0), record_stream=note)

    def queue(self, name):
        self.events.append(f"{name} on {self.current.name}")


@pytest.fixture
def streams(monkeypatch):
    yield FakeStreams(monkeypatch)
    device_module._side_stream.cache_clear()


def test_beside_waits_in_the_right_order(streams):
    x, y = streams.tensor("x"), streams.tensor("y")
    streams.queue("before")
    pending = beside(lambda given: (streams.queue(f"work with {given.name}"), y)[1], x)
    streams.queue("meanwhile")
    assert pending.result() is y
    streams.queue("after")
    assert streams.events == [
        "before on main", "side waits for main", "work with x on side", "x is kept for side", "meanwhile on main",
        "main waits for side", "y is kept for main", "after on main",
    ]  # fmt: skip


def test_beside_keeps_each_of_several_results(streams):
    made = streams.tensor("y"), None, streams.tensor("z")
    pending = beside(lambda given: made, streams.tensor("x"))
    del streams.events[:]
    assert pending.result() is made
    assert streams.events == ["main waits for side", "y is kept for main", "z is kept for main"]


def test_beside_uses_one_side_stream_and_takes_work_without_a_result(streams):
    x = streams.tensor("x")
    first, second = (beside(lambda given: None, x) for _ in range(2))
    assert first.result() is None
    assert first._stream is second._stream


def test_beside_works_at_once_on_a_cpu_and_when_compiled(streams, monkeypatch):
    x = torch.ones(3)
    assert torch.equal(beside(torch.neg, x).result(), -x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    done = []
    beside(done.append, streams.tensor("x"))
    assert len(done) == 1
    assert streams.events == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_beside_on_a_gpu_gives_the_same_forward_and_backward():
    """Many times with memory pressed, so that a missing wait or a block given away too early would show."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 512, generator=generator).cuda().requires_grad_()
    x = torch.randn(4096, 512, generator=generator).cuda()

    def run(start):
        given = (x * 1.5).requires_grad_()
        pending = start(lambda t: (t @ weight).relu() @ weight, given)
        other = (given @ weight).sin()
        y = pending() + other
        del other
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (given, weight))]

    expected = run(lambda work, given: functools.partial(lambda made: made, work(given)))
    for _ in range(50):
        found = run(lambda work, given: beside(work, given).result)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
