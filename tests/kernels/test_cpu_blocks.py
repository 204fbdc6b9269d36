"""The CPU's SwiGLU kernels without torch, under the address sanitizer; with vectors of AVX-512 on any machine too."""

import os
import platform
import subprocess
from pathlib import Path

import pytest
from emulation import SANITIZE, SOURCES, address_sanitizer, compiler

DRIVER = Path(__file__).with_name("cpu_blocks.cpp")
# Without optimisation: it would take longer than it saves.
FLAGS = ("-std=c++17", "-O0", "-g1", "-Wno-psabi", "-march=x86-64-v3")


@pytest.mark.parametrize(("lanes", "wide"), [(16, ()), (32, ("-DDSMOE_WIDE",))], ids=["vectors of 8", "vectors of 16"])
def test_against_double_under_the_address_sanitizer(lanes, wide, tmp_path):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the number of lanes is that of x86-64-v3")
    if address_sanitizer() is None:
        pytest.skip("no g++ with libasan: the kernels cannot be run under the address sanitizer")
    program = tmp_path / "cpu_blocks"
    flags = (*FLAGS, *SANITIZE, *wide, f"-I{SOURCES}")
    command = [compiler(), *flags, str(DRIVER), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[:4000]
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    ran = subprocess.run([program], capture_output=True, text=True, check=False, env=plain)
    assert ran.returncode == 0, ran.stdout + ran.stderr[:4000]
    assert ran.stdout == f"{lanes} lanes\n"
