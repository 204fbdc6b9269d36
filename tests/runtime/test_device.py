"""Device choice with a pretended number of GPUs, and what can be measured on a CPU."""

import time

import numpy as np
import pytest
import torch

from dsmoe.base.errors import ConfigError
from dsmoe.runtime import device as device_module
from dsmoe.runtime.device import Device, datasheet_peak


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
