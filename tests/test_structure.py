"""This repository keeps the house rules, and each rule notices a planted violation."""

from pathlib import Path

import pytest
from structure_rules import DESIGN, RULES, TOP, floors

ROOT = Path(__file__).resolve().parents[1]
DOC = '"""Something."""\n'


@pytest.mark.parametrize("rule", RULES)
def test_the_repository_keeps(rule):
    found = RULES[rule](ROOT)
    assert not found, f"{RULES[rule].__doc__}\n" + "\n".join(found)


def test_floors_are_read_from_the_design():
    heights = floors((ROOT / DESIGN).read_text(encoding="utf-8"))
    order = ["base", "runtime", "ops", "moe", "data", "tasks", "checkpoint", "training", "launchers"]
    assert [heights[room] for room in order] == list(range(9))
    assert len({heights[room] for room in ("data", "codec", "diffusion", "models")}) == 1
    assert len({heights[room] for room in ("checkpoint", "ds_config", "preprocess")}) == 1
    assert len({heights[room] for room in ("training", "evaluation", "scaling", "convert")}) == 1
    assert len({heights[room] for room in TOP}) == 1
    assert len(heights) == 16 + len(TOP)


@pytest.fixture
def tree(tmp_path):
    """A small repository that keeps every rule; a function that plants one more file."""
    (tmp_path / "docs").mkdir()
    (tmp_path / DESIGN).write_text((ROOT / DESIGN).read_text(encoding="utf-8"))

    def plant(path: str, source: str) -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
        return tmp_path

    for path, source in CLEAN.items():
        plant(path, source)
    return plant


CLEAN = {
    "dsmoe/__init__.py": DOC + '__version__ = "0"\n',
    "dsmoe/__main__.py": DOC + "from dsmoe import __version__\nfrom dsmoe.training import loop\n",
    "dsmoe/base/metrics.py": DOC + "import torch\n",
    "dsmoe/runtime/device.py": DOC + "import torch\nN = torch.cuda.device_count\n",
    "dsmoe/runtime/launch_environment.py": DOC + 'NAME = "RANK"\n',
    "dsmoe/moe/deepspeed_layer.py": DOC + "import deepspeed\nfrom dsmoe.moe.block import MoE\n",
    "dsmoe/moe/block.py": DOC + 'class MoE:\n    """A block."""\nclass _Private:\n    pass\n',
    "dsmoe/ds_config/emit.py": DOC + 'KEY = "zero_optimization"\n',
    "dsmoe/training/loop.py": DOC + "import deepspeed\nfrom dsmoe.ds_config import emit\nfrom . import other\n",
    "launchers/pretrain.py": "from dsmoe.training import loop\nimport torch\ntorch.load('x', weights_only=True)\n",
    "benchmarks/suite.py": "import torch\ntorch.cuda.synchronize()\n",
    "tests/test_x.py": "def test_x():\n    pass\n",
}


@pytest.mark.parametrize("rule", RULES)
def test_a_clean_tree_passes(tree, rule):
    assert RULES[rule](tree("dsmoe/base/errors.py", DOC)) == []


LONG_FUNCTION = DOC + 'def f():\n    """Long."""\n' + "    x = 1\n" * 58
PLANTED = [
    ("arrows", "dsmoe/runtime/a.py", DOC + "from dsmoe.ops import route\n"),
    ("arrows", "dsmoe/data/a.py", DOC + "import dsmoe.codec.build\n"),
    ("arrows", "dsmoe/data/a.py", DOC + "def f():\n    from dsmoe import codec\n"),
    ("arrows", "dsmoe/evaluation/a.py", DOC + "from dsmoe.training.loop import x\n"),
    ("arrows", "dsmoe/models/a.py", DOC + "from ..tasks import depth\n"),
    ("arrows", "dsmoe/models/deep/a.py", DOC + "from ...tasks import depth\n"),
    ("arrows", "dsmoe/training/a.py", DOC + "from launchers import pretrain\n"),
    ("arrows", "dsmoe/training/a.py", DOC + "from dsmoe import __main__\n"),
    ("arrows", "launchers/a.py", "from benchmarks import suite\n"),
    ("arrows", "dsmoe/attic/a.py", DOC),
    ("arrows", "dsmoe/helpers.py", DOC),
    ("arrows", "dsmoe/__init__.py", DOC + "from dsmoe.base import errors\n"),
    ("deepspeed_imports", "dsmoe/ds_config/a.py", DOC + "import deepspeed.runtime\n"),
    ("deepspeed_imports", "dsmoe/moe/block2.py", DOC + "def f():\n    from deepspeed import comm\n"),
    ("torch_in_base", "dsmoe/base/a.py", DOC + "def f():\n    import torch.nn as nn\n"),
    ("cuda_calls", "dsmoe/ops/a.py", DOC + "import torch\nx = torch.cuda.is_available()\n"),
    ("cuda_calls", "dsmoe/ops/a.py", DOC + "from torch import cuda\n"),
    ("cuda_calls", "launchers/a.py", "from torch.cuda import synchronize\n"),
    ("rank_variables", "dsmoe/training/a.py", DOC + "import os\nr = os.environ.get('LOCAL_RANK', 0)\n"),
    ("rank_variables", "launchers/a.py", "n = 'SLURM_PROCID'\n"),
    ("lengths", "dsmoe/data/a.py", DOC + "x = 1\n" * 399),
    ("lengths", "dsmoe/data/a.py", LONG_FUNCTION),
    ("lengths", "tests/test_y.py", "class A:\n    def f(self):\n" + "        x = 1\n" * 59),
    ("unsafe_calls", "dsmoe/checkpoint/a.py", DOC + "import torch\ntorch.load('x')\n"),
    ("unsafe_calls", "dsmoe/checkpoint/a.py", DOC + "import torch\ntorch.load('x', weights_only=False)\n"),
    ("unsafe_calls", "dsmoe/checkpoint/a.py", DOC + "load(x, weights_only=flag)\n"),
    ("unsafe_calls", "dsmoe/base/a.py", DOC + "import yaml\nyaml.load(f)\n"),
    ("unsafe_calls", "dsmoe/base/a.py", DOC + "def f():\n    import pickle\n"),
    ("unsafe_calls", "dsmoe/base/a.py", DOC + "import subprocess\nsubprocess.run('x', shell=True)\n"),
    ("unsafe_calls", "dsmoe/data/a.py", DOC + "import numpy as np\nnp.load('x', allow_pickle=True)\n"),
    ("unsafe_calls", "dsmoe/base/a.py", DOC + "eval('1')\n"),
    ("deepspeed_keys", "dsmoe/training/a.py", DOC + "c = {'train_micro_batch_size_per_gpu': 1}\n"),
    ("deepspeed_keys", "launchers/a.py", "def f(c):\n    return c['zero_optimization']\n"),
    ("docstrings", "dsmoe/ops/a.py", "x = 1\n"),
    ("docstrings", "dsmoe/ops/a.py", DOC + "def route():\n    pass\n"),
    ("docstrings", "dsmoe/ops/a.py", DOC + "class Routing:\n    x = 1\n"),
]


@pytest.mark.parametrize(("rule", "path", "source"), PLANTED, ids=[f"{i}-{p[0]}" for i, p in enumerate(PLANTED)])
def test_a_planted_violation_is_found(tree, rule, path, source):
    found = RULES[rule](tree(path, source))
    assert found
    assert all(line.startswith(f"{path}:") for line in found)


def test_every_rule_has_a_planted_violation():
    assert {rule for rule, _, _ in PLANTED} == set(RULES)
