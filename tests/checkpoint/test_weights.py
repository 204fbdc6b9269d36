"""Weight files: whole or absent, strict, and self-describing."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dsmoe.base.errors import CheckpointError
from dsmoe.base.plan import DataFacts, EngineFacts, ModelFacts, Plan
from dsmoe.base.recipe import recipe_from_dict
from dsmoe.checkpoint.weights import Weights, build_model, load_weights, new_model, save_weights, stream_weights


@pytest.fixture
def plan():
    recipe = recipe_from_dict(
        {
            "name": "tiny",
            "model": {"depth": 1, "dim": 16, "heads": 2, "num_experts": 2, "top_k": 1, "shared_ratio": 1.0},
            "train": {"images": 256},
        }
    )
    return Plan(
        recipe=recipe,
        engine=EngineFacts(
            ds_config="x.json", about="", zero_stage=1, precision="fp32", world_size=1, micro_batch=1, accumulation=1,
            expert_parallel_size=1, activation_checkpointing=False, optimizer="AdamW", offload=False,
        ),
        data=DataFacts(items=10, class_names=("a", "b", "c")),
        model=ModelFacts(
            input_size=4, in_channels=4, num_classes=3, learn_sigma=True, null_class=True, parameters=1,
            active_parameters=1, macs=1,
        ),
        codec={"name": "none"},
        schedule={},
        memory={},
    )  # fmt: skip


@pytest.fixture
def weights(plan):
    torch.manual_seed(0)
    model = new_model(plan)
    state = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    return Weights(state, plan, 1234, "ema")


def test_round_trip_is_exact_and_keeps_the_plan(weights, tmp_path):
    save_weights(tmp_path / "w.safetensors", weights)
    found = load_weights(tmp_path / "w.safetensors")
    assert found.plan == weights.plan
    assert (found.images_seen, found.kind) == (1234, "ema")
    assert all(torch.equal(found.state[n], t) for n, t in weights.state.items())
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_built_model_holds_the_weights_and_does_not_train(weights):
    model = build_model(weights)
    assert not model.training
    assert all(torch.equal(p, weights.state[n]) and not p.requires_grad for n, p in model.named_parameters())


def test_failed_write_leaves_the_old_file(weights, tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, weights)
    before = path.read_bytes()
    shapes = {name: tuple(t.shape) for name, t in weights.state.items()}

    def full_disk():
        yield next(iter(weights.state.items()))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        stream_weights(path, shapes, full_disk(), weights.plan, 1, "ema")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_missing_extra_and_misshapen_entries_are_named(weights):
    state = dict(weights.state)
    state["blocks.0.moe.gate.weight"] = torch.zeros(3, 16)
    state["stranger"] = torch.zeros(1)
    del state["final_layer.linear.bias"]
    with pytest.raises(CheckpointError) as caught:
        build_model(Weights(state, weights.plan, 0, "ema"))
    for name in ("blocks.0.moe.gate.weight", "stranger", "final_layer.linear.bias"):
        assert name in str(caught.value)


@pytest.mark.parametrize("kind", ["absent", "text", "truncated", "foreign", "other format"])
def test_unusable_files_are_one_clear_line(kind, weights, tmp_path):
    path = tmp_path / "w.safetensors"
    if kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        save_weights(path, weights)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "foreign":
        save_file({"a": torch.zeros(2)}, path)
    elif kind == "other format":
        tree = {**weights.plan.to_dict(), "format": 99}
        save_file(
            {"a": torch.zeros(2)}, path, metadata={"dsmoe_plan": json.dumps(tree), "images_seen": "0", "kind": "ema"}
        )
    with pytest.raises(CheckpointError) as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or kind == "other format"
