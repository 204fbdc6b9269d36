"""From a command to a plan: what the machine decides, and numbers people read off `--plan`."""

import json

import pytest
import torch
from made_plan import RECIPE_FILE

from dsmoe.base.errors import ConfigError
from dsmoe.base.memory import Buckets, Layout, ModelShape, rank_memory
from dsmoe.base.recipe import load_recipe
from dsmoe.runtime.device import Device
from dsmoe.runtime.distributed import discover
from dsmoe.training.prepare import parse_command, prepare


def config(tmp_path, **content):
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("change", ["model.conditions=1", "model.tasks=2"])
def test_a_perception_model_is_not_trained_on_classes(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE_FILE)
    engine = config(tmp_path, zero_optimization={"stage": 1})
    with pytest.raises(ConfigError, match="belong to perception"):
        prepare(parse_command(["--deepspeed_config", engine, "--recipe", "r.yaml", change], ""), discover({}))


def test_a_precision_that_the_device_lacks_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE_FILE)
    engine = config(tmp_path, bf16={"enabled": True}, zero_optimization={"stage": 1})
    command = parse_command(["--deepspeed_config", engine, "--recipe", "r.yaml"], "")
    assert prepare(command, discover({})).plan.engine.precision == "bf16"
    monkeypatch.setattr(Device, "supports", lambda self, dtype: dtype != torch.bfloat16)
    with pytest.raises(ConfigError, match=r"bf16 is not supported by .*; use fp16"):
        prepare(command, discover({}))


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            ["diffusion.prediction=v", "diffusion.schedule=cosine", "diffusion.learn_sigma=false"],
            ["v, fixed variance", "cosine, alpha_bar 0.999959 .. 2.43e-09", "uniform times, gaussian noise"],
        ),
        (
            [
                "diffusion.prediction=velocity", "diffusion.schedule=rectified_flow",
                "diffusion.time_density=logit_normal", "diffusion.noise=multi_resolution",
            ],
            [
                "velocity, mean squared error alone", "rectified_flow, the model is told t in (0, 1]",
                "logit_normal times, multi_resolution of strength 0.9 t/T noise",
            ],
        ),
    ],
)  # fmt: skip
def test_the_plan_says_what_is_predicted_and_how_it_is_noised(tmp_path, monkeypatch, changes, lines):
    """alpha_bar of the cosine schedule: cos^2 at 1/1000 over that at 0 (IDDPM eq. 17), contracts 6 at the end."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE_FILE)
    engine = config(tmp_path, zero_optimization={"stage": 1})
    plan = prepare(parse_command(["--deepspeed_config", engine, "--recipe", "r.yaml", *changes], ""), discover({})).plan
    assert [plan.schedule[key] for key in ("objective", "noise schedule", "noising")] == lines


def test_the_plan_counts_the_memory_of_its_layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE_FILE)
    zero = {"stage": 2, "reduce_bucket_size": 1000}
    engine = config(tmp_path, bf16={"enabled": True}, zero_optimization=zero)
    memory = prepare(parse_command(["--deepspeed_config", engine, "--recipe", "r.yaml"], ""), discover({})).plan.memory
    recipe = load_recipe("r.yaml")
    shape = ModelShape(spec=recipe.model, input_size=32, channels=3, num_classes=16, learn_sigma=True)
    layout = Layout(
        zero_stage=2, world_size=1, precision="bf16", micro_batch=128, buckets=Buckets(reduce=1000, gather=500_000_000)
    )
    assert memory == rank_memory(shape, layout, resident=True).peak
    engine = config(tmp_path, zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}})
    memory = prepare(parse_command(["--deepspeed_config", engine, "--recipe", "r.yaml"], ""), discover({})).plan.memory
    assert memory["offloaded moments"] == 8 * shape.count.trained
