"""Weight files to draw from, made without training."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dsmoe.base.plan import DataFacts, EngineFacts, ModelFacts, Plan
from dsmoe.base.recipe import recipe_from_dict
from dsmoe.checkpoint.weights import Weights, new_model, save_weights
from dsmoe.data.scenes import Scenes
from dsmoe.runtime import logging

SIDE = 32


def make_plan(class_names: tuple[str, ...], **changes: object) -> Plan:
    """A tiny DiT-MoE on 32 px images without a codec; `changes` replace fields of the Plan."""
    recipe = recipe_from_dict(
        {
            "name": "tiny",
            "model": {
                "depth": 1, "dim": 16, "heads": 2, "patch": 8, "num_experts": 2, "top_k": 1, "shared_ratio": 1.0,
            },
            "data": {"resolution": SIDE},
            "codec": {"name": "none"},
            "train": {"images": 256, "seed": 7},
            "report": {"sample_steps": 2, "guidance": 3.0, "cfg_channels": "all"},
        }
    )  # fmt: skip
    fields = {
        "recipe": recipe,
        "engine": EngineFacts(
            ds_config="x.json", about="", zero_stage=1, precision="fp32", world_size=1, micro_batch=1, accumulation=1,
            expert_parallel_size=1, activation_checkpointing=False, optimizer="AdamW", offload=False,
        ),
        "data": DataFacts(items=10, class_names=class_names),
        "model": ModelFacts(
            input_size=SIDE, in_channels=3, num_classes=len(class_names), learn_sigma=True, null_class=True,
            parameters=1, active_parameters=1, macs=1,
        ),
        "codec": {"name": "none", "sha256": "none", "scale": "1.0", "factor": "1"},
        "schedule": {},
        "memory": {},
    }  # fmt: skip
    return Plan(**(fields | changes))


def write_run_folder(folder: Path, plan: Plan, *, zero: bool = False) -> Path:
    """A run folder with averaged weights: random ones, or with `zero` those of a model whose output is zero."""
    torch.manual_seed(0)
    state = {n: p if zero else torch.randn_like(p) * 0.2 for n, p in new_model(plan).named_parameters()}
    (folder / "ckpt").mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan.to_dict()))
    save_weights(folder / "ckpt" / "ema.safetensors", Weights(state, plan, 1234, "ema"))
    return folder


@pytest.fixture
def abc_plan() -> Callable[..., Plan]:
    return lambda **changes: make_plan(("a", "b", "c"), **changes)


@pytest.fixture
def write_run() -> Callable[..., Path]:
    return write_run_folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Three classes a, b, c; random weights."""
    return write_run_folder(tmp_path / "run", make_plan(("a", "b", "c")))


@pytest.fixture
def zero_run(tmp_path: Path) -> Path:
    """Three classes; the model predicts zero noise everywhere."""
    return write_run_folder(tmp_path / "zero", make_plan(("a", "b", "c")), zero=True)


@pytest.fixture
def scenes_run(tmp_path: Path) -> Path:
    """The scenes' classes; random weights."""
    return write_run_folder(tmp_path / "scenes", make_plan(Scenes("train", SIDE).class_names))


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """Commands set up the console log on the stream of their test, which is closed after it."""
    yield
    logging.configure(stream=sys.__stderr__)
