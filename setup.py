"""Packaging. Building needs neither torch nor a compiler: compiled operations are found at run time, if at all.

DeepSpeed comes as source and imports torch while it is built, so torch must be there first:

    pip install -c constraints/cpu-py311.txt torch numpy setuptools wheel ninja packaging
    DS_BUILD_OPS=0 pip install -c constraints/cpu-py311.txt --no-build-isolation deepspeed
    pip install -c constraints/cpu-py311.txt --no-build-isolation -e .[dev]

`make env` does just that.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "dsmoe" / "__init__.py").read_text(encoding="utf-8"), re.M)[1]

setup(
    name="dsmoe",
    version=VERSION,
    description="Diffusion transformers with mixture-of-experts on DeepSpeed",
    packages=find_packages(include=["dsmoe", "dsmoe.*"]),
    package_data={
        "dsmoe.base": ["recipes/*.yaml"],
        "dsmoe.codec": ["weights/*.safetensors"],
        "dsmoe.evaluation": ["weights/*.safetensors"],
        "dsmoe.ops.native": ["libdsmoe_kernels.so.1"],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed==0.19.8",
        "numpy",
        "pyyaml",
        "safetensors",
        "pillow",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "mpi": ["mpi4py"],
        "megatron": ["megatron-core"],
        "data": ["diffusers", "pyarrow"],
        "dev": ["pytest>=9", "ruff", "ninja", "scipy", "diffusers", "megatron-core", "pyarrow"],
    },
)
