"""Files in, files out: bit for bit, and the same forward result as a plain implementation of the published one."""

import argparse
import json

import pytest
import torch
from convert.published import SMALL, forward, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsmoe.__main__ import main
from dsmoe.checkpoint.weights import build_model, load_weights
from dsmoe.tasks.class_sampling import sampling_of

SHOWN = {
    "dit": ["--from", "dit", "--heads", "2"],
    "dit-moe-timm": ["--heads", "2", "--top-k", "2"],
    "dit-moe-flash": ["--top-k", "2"],
    "generalist": ["--objective", "v", "--heads", "2", "--top-k", "2"],
}
every_kind = pytest.mark.parametrize("name", SMALL)


def convert(*words):
    assert main(["convert", *map(str, words)]) == 0


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key


def example(kind, count=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, kind.inputs, kind.side, kind.side, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.02, 0.3, 0.5, 1.0]) if kind.flash else torch.tensor([0.0, 1.0, 500.0, 999.0])
    return x, t.double(), torch.tensor([1000, 1003, 1001, 1002] if kind.convs else [3, 1000, 7, 999])


@every_kind
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_published_to_ours_and_back_is_the_same_bits_and_the_same_function(name, ending, tmp_path):
    kind, state = SMALL[name], weights(SMALL[name])
    source, ours = tmp_path / f"in.{ending}", tmp_path / "ours.safetensors"
    torch.save(state, source) if ending == "pt" else save_file(state, source)
    convert(source, ours, *SHOWN[name])
    model = build_model(load_weights(ours)).double()
    x, t, y = example(kind)
    got, expected = model(x, t, y)[0], forward(state, kind, x, t, y)
    # fp64 of sums of at most 256 terms over two layers: 1e-12 of the output is a thousand roundings.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    form = name.removesuffix("-timm").removesuffix("-flash")
    convert(ours, tmp_path / f"back.{ending}", "--to", form)
    back = tmp_path / f"back.{ending}"
    assert_same(torch.load(back, weights_only=True) if ending == "pt" else load_file(back), state)


@every_kind
def test_our_weights_to_published_and_back_are_the_same_bits(name, tmp_path):
    torch.save(weights(SMALL[name]), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "a.safetensors", *SHOWN[name])
    convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
    convert(tmp_path / "b.pt", tmp_path / "b.safetensors", *SHOWN[name])
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_short_dtypes_stay_as_they_are_and_can_be_asked_for(tmp_path):
    state = weights(SMALL["dit-moe-flash"], dtype=torch.float16)
    torch.save(state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "a.safetensors", *SHOWN["dit-moe-flash"])
    assert {t.dtype for t in load_file(tmp_path / "a.safetensors").values()} == {torch.float16}
    convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
    assert_same(torch.load(tmp_path / "b.pt", weights_only=True), state)
    convert(tmp_path / "a.safetensors", tmp_path / "c.pt", "--dtype", "bf16")
    short = torch.load(tmp_path / "c.pt", weights_only=True)
    expected = {key: value.bfloat16() for key, value in state.items()} | {"pos_embed": state["pos_embed"]}
    assert_same(short, expected)


def training_file(path, name="dit", *, prefix="", **arguments):
    """What published train.py scripts save: {model, ema, opt, args}."""
    kind = SMALL[name]
    averaged, trained = ({f"{prefix}{k}": v for k, v in weights(kind, seed).items()} for seed in (1, 2))
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]}
    args = argparse.Namespace(global_batch_size=256, **arguments)
    torch.save({"model": trained, "ema": averaged, "opt": optimizer, "args": args}, path)
    return averaged, trained


def plan_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["dsmoe_plan"])


def test_the_average_of_a_training_file_is_taken_or_what_is_asked_for(tmp_path, capsys):
    averaged, trained = training_file(tmp_path / "ckpt.pt", prefix="module.")
    for extra, state, kind in (([], averaged, "ema"), (["--kind", "model"], trained, "model")):
        out = tmp_path / f"{kind}.safetensors"
        convert(tmp_path / "ckpt.pt", out, "--heads", 2, *extra)
        found = load_weights(out)
        assert found.kind == kind
        expected = {key.removeprefix("module."): value for key, value in state.items()}
        del expected["module.pos_embed".removeprefix("module.")]
        assert_same(found.state, expected)
    printed = capsys.readouterr().out
    assert "its training arguments are those of DiT" in printed
    assert "left out: model, opt, args" in printed
    assert "every name began with 'module.'" in printed


def test_training_arguments_are_read_where_another_library_calls_them_safe(tmp_path, capsys):
    """Megatron-core does, for the whole process."""
    training_file(tmp_path / "ckpt.pt", prefix="module.")
    with torch.serialization.safe_globals([argparse.Namespace]):
        convert(tmp_path / "ckpt.pt", tmp_path / "o.safetensors", "--heads", 2)
    assert "its training arguments are those of DiT" in capsys.readouterr().out


def test_conventions_ride_in_the_weight_file(tmp_path):
    """Each with the sampler, times and guidance of its own code (contracts 2.1.8, 2.1.10, 2.2)."""
    training_file(tmp_path / "dit.pt")
    training_file(tmp_path / "sit.pt", path_type="Linear", prediction="velocity")
    torch.save(weights(SMALL["dit-moe-flash"]), tmp_path / "flash.pt")
    training_file(tmp_path / "rf.pt", "dit-moe-timm", rf=True)
    expected = {
        "dit": ("epsilon", "linear", "noise", "ancestral", 250, 3),
        "sit": ("velocity", "rectified_flow", "image", "euler", 250, 3),
        "flash": ("velocity", "rectified_flow", "noise", "euler", 50, "all"),
        "rf": ("velocity", "rectified_flow", "noise", "euler", 50, "all"),
    }
    for name, (predicts, schedule, end, sampler, steps, channels) in expected.items():
        out = tmp_path / f"{name}.safetensors"
        convert(tmp_path / f"{name}.pt", out, "--heads", 2, *(["--top-k", 2] if name in ("flash", "rf") else []))
        plan = load_weights(out).plan
        diffusion, sampling = plan.recipe.diffusion, sampling_of(plan)
        assert (diffusion.prediction, diffusion.schedule, diffusion.flow_end) == (predicts, schedule, end)
        assert (sampling.sampler, sampling.steps, sampling.cfg_channels) == (sampler, steps, channels)
        assert diffusion.t_scale == 1
        assert diffusion.learn_sigma
        assert plan.codec == {"name": "sd", "sha256": "unknown", "scale": "0.18215", "factor": "8"}
        assert plan.model.null_class
        assert plan.recipe.data.resolution == 64


def test_another_size_computes_another_table_and_nothing_else(tmp_path, capsys):
    kind, state = SMALL["dit"], weights(SMALL["dit"])
    torch.save(state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "a.safetensors", *SHOWN["dit"], "--size", 128)
    assert "resized to 8 x 8" in capsys.readouterr().out
    convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
    larger = torch.load(tmp_path / "b.pt", weights_only=True)
    wide = weights(type(kind)(**{**kind.__dict__, "tokens": 64}))
    assert torch.equal(larger.pop("pos_embed"), wide["pos_embed"])
    assert_same(larger, {key: value for key, value in state.items() if key != "pos_embed"})
