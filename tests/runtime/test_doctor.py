"""The report, with packages, commands and locks pretended."""

import importlib.metadata
import os
import re
import stat

from dsmoe.runtime import doctor

OPS = {"cpu": [("route", "native", ("native", "reference"))]}


def _report(**kwargs) -> dict[str, str]:
    return dict(doctor.report(lambda kind: OPS.get(kind, []), "of these sources", **kwargs))


def test_packages_that_are_there_and_that_are_not(monkeypatch):
    def version(name):
        if name == "deepspeed":
            return "1.2.3"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = _report(measure=False)
    assert found["deepspeed"] == "1.2.3"
    assert found["apex"].startswith("not found (")
    assert found["mpi4py"].startswith("not found (")


def test_ops_of_the_device_that_would_be_used(monkeypatch):
    monkeypatch.setattr(doctor, "gpu_count", lambda: 0)
    assert _report(measure=False)["kernels"] == "of these sources"
    assert _report(measure=False)["op route"] == "native (of native, reference)"


def test_rates_are_measured_on_demand(monkeypatch):
    monkeypatch.setattr(doctor, "gpu_count", lambda: 0)
    monkeypatch.setattr(doctor.Device, "matmul_rate", lambda *_: 1.5e12)
    assert "float32 matmul 1.5 TFLOP/s" in _report()["device"]
    assert "matmul" not in _report(measure=False)["device"]


def test_compiler_versions_come_from_the_compilers(monkeypatch, tmp_path):
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\necho 'nvcc: a compiler'\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + "/bin")
    found = _report(measure=False)
    assert found["nvcc"] == f"{fake}: Cuda compilation tools, release 13.0, V13.0.88"
    assert found["ninja"] == "not found" or "ninja" in found["ninja"]


def test_a_compiler_that_does_not_run_is_told(monkeypatch, tmp_path):
    fake = tmp_path / "nvcc"
    fake.write_bytes(b"\x7fELF not really")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "which does not run" in _report(measure=False)["nvcc"]


def test_stale_locks_are_told(monkeypatch, tmp_path):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (1, 1))
    os.utime(lock.parent, (1, 1))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    found = _report(measure=False)
    assert found["extensions"] == str(tmp_path)
    assert re.search(rf"rm {lock}$", found["stale lock"])
