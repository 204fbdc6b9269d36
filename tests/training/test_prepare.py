"""From a command to a plan: what the machine decides, and numbers people read off `--plan`."""

import json

import pytest
import torch
from made_images import png
from made_plan import RECIPE_FILE
from made_shards import parquet

from dsmoe import ops
from dsmoe.base.errors import ConfigError
from dsmoe.base.memory import Buckets, Layout, ModelShape, rank_memory
from dsmoe.base.plan import Plan, describe
from dsmoe.base.recipe import load_recipe
from dsmoe.ops import native
from dsmoe.runtime.device import Device
from dsmoe.runtime.distributed import discover
from dsmoe.training.engine import build_engine
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


def test_preferred_operations_are_in_the_plan_and_reach_the_process_that_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE_FILE)
    file = config(tmp_path, dsmoe={"ops": {"route": "reference"}})
    plan = prepare(parse_command(["--deepspeed_config", file, "--recipe", "r.yaml"], ""), discover({})).plan
    assert plan.engine.ops == {"route": "reference"}
    assert Plan.from_dict(plan.to_dict()) == plan
    (line,) = [line for line in describe(plan).splitlines() if line.startswith("preferred operations")]
    assert line.endswith(" route: reference")

    class Heard(Exception):
        pass

    def hear(preferences, device_type):
        raise Heard(preferences, device_type)

    monkeypatch.setattr(ops, "prefer", hear)
    with pytest.raises(Heard) as heard:
        build_engine(plan, None, None, {}, torch.device("cpu"))
    assert heard.value.args == ({"route": "reference"}, "cpu")


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


def test_the_plan_says_what_data_was_found_and_what_parquet_costs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE_FILE)
    parquet(tmp_path / "data" / "t-0.parquet", [png(i, 8, 8) for i in range(6)], range(6), group=4)
    engine = config(tmp_path, zero_optimization={"stage": 1})
    given = ["data.source=parquet", "data.path=data", "data.size=null", "codec.cache=none"]

    def planned(*more):
        command = parse_command(["--deepspeed_config", engine, "--recipe", "r.yaml", *given, *more], "")
        return prepare(command, discover({})).plan

    items, blocks = planned(), planned("data.shuffle_block=4")
    assert "data                        parquet data, 6 images, 6 classes, 32 px\n" in describe(items)
    assert "parquet data, 6 images, 6 classes, 32 px, in blocks of 4\n" in describe(blocks)
    assert any("row group, up to 4 images; data.shuffle_block=4 reads" in line for line in items.warnings)
    assert not any("row group" in line for line in blocks.warnings)
    assert items.science_hash != blocks.science_hash


def test_the_plan_counts_the_memory_of_its_layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE_FILE)
    zero = {"stage": 2, "reduce_bucket_size": 1000}
    recipe = load_recipe("r.yaml")
    shape = ModelShape(spec=recipe.model, input_size=32, channels=3, num_classes=16, learn_sigma=True)
    for preferred, compiled in (({}, bool(native.DEVICES)), ({"moe_ffn": "reference"}, False)):
        engine = config(tmp_path, bf16={"enabled": True}, zero_optimization=zero, dsmoe={"ops": preferred})
        command = parse_command(["--deepspeed_config", engine, "--recipe", "r.yaml"], "")
        layout = Layout(
            zero_stage=2, world_size=1, precision="bf16", micro_batch=128, compiled_ops=compiled,
            buckets=Buckets(reduce=1000, gather=500_000_000),
        )  # fmt: skip
        assert prepare(command, discover({})).plan.memory == rank_memory(shape, layout, resident=True).peak
    engine = config(tmp_path, zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}})
    memory = prepare(parse_command(["--deepspeed_config", engine, "--recipe", "r.yaml"], ""), discover({})).plan.memory
    assert memory["offloaded moments"] == 8 * shape.count.trained
