"""python -m dsmoe convert: runs and checkpoints of ours, what a format cannot hold, mistakes in one line."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from convert.published import SMALL, weights
from made_plan import made_plan, made_recipe
from safetensors.torch import load_file

from dsmoe.__main__ import main
from dsmoe.base.run_folder import RunFolder
from dsmoe.checkpoint.manifest import Piece
from dsmoe.checkpoint.saver import Saver
from dsmoe.checkpoint.store import Store
from dsmoe.checkpoint.weights import Weights, load_weights, new_model, save_weights


def plan(**sections):
    made = made_plan(made_recipe(data={"resolution": 8}, model={"depth": 1, "dim": 16, "num_experts": 2}, **sections))
    return dataclasses.replace(made, model=dataclasses.replace(made.model, input_size=8))


def write_weights(path, of):
    torch.manual_seed(0)
    state = {name: torch.randn_like(tensor) for name, tensor in new_model(of).state_dict().items()}
    save_weights(path, Weights(state, of, 1234, "ema"))
    return state


def convert(*words):
    assert main(["convert", *map(str, words)]) == 0


def refused(capsys, *words):
    assert main(["convert", *map(str, words)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_weight_file_and_a_run_folder_of_ours_are_read(tmp_path):
    folder = tmp_path / "run"
    (folder / "ckpt").mkdir(parents=True)
    state = write_weights(folder / "ckpt" / "ema.safetensors", plan())
    convert(folder, tmp_path / "a.pt")
    convert(folder / "ckpt" / "ema.safetensors", tmp_path / "b.pt")
    got, same = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert got.keys() == same.keys()
    assert torch.equal(got["blocks.0.moe.experts.1.up_proj.weight"], state["blocks.0.moe.experts.w3"][1])
    convert(folder, tmp_path / "half.safetensors", "--dtype", "bf16")
    half = load_weights(tmp_path / "half.safetensors")
    assert half.images_seen == 1234
    assert half.plan == plan()
    assert all(torch.equal(half.state[name], state[name].bfloat16()) for name in state)


def test_a_resumable_checkpoint_of_ours_is_read_by_kind(tmp_path):
    """From the newest of a run folder, or one folder; its pieces put together."""
    run, made = RunFolder(tmp_path / "run"), plan()
    lease = run.create(made)
    shapes = {name: tuple(p.shape) for name, p in new_model(made).named_parameters()}
    states = {
        kind: {n: torch.randn(s) for n, s in shapes.items()} for kind in ("master", "ema", "exp_avg", "exp_avg_sq")
    }
    pieces = [
        Piece(kind, name, shapes[name], 0, tensor.reshape(-1))
        for kind, state in states.items()
        for name, tensor in state.items()
    ]
    saver = Saver(Store(run.checkpoints), lease, 1)
    saver.begin(256, pieces, {"plan": made.to_dict(), "optimizer_steps": 32, "steps": 32}, 1 << 20)
    assert saver.finish()
    saved = Store(run.checkpoints).path(256)
    for source, kind, wanted in ((run.path, None, "ema"), (saved, "model", "master")):
        out = tmp_path / f"{wanted}.safetensors"
        convert(source, out, *(["--kind", kind] if kind else []))
        found = load_weights(out)
        assert (found.images_seen, found.kind) == (256, kind or "ema")
        assert all(torch.equal(found.state[name], states[wanted][name]) for name in shapes)
    (saved / "rank00000.safetensors").write_bytes(b"x")
    assert main(["convert", str(saved), str(tmp_path / "x.safetensors")]) == 2


def test_selection_biases_stay_in_ours_and_are_never_dropped_unasked(tmp_path, capsys):
    state = write_weights(tmp_path / "w.safetensors", plan(balance={"bias_rate": 0.001}))
    convert(tmp_path / "w.safetensors", tmp_path / "again.safetensors", "--dtype", "bf16")
    again = load_file(tmp_path / "again.safetensors")
    assert torch.equal(again["blocks.0.moe.selection_bias"], state["blocks.0.moe.selection_bias"])
    line = refused(capsys, tmp_path / "w.safetensors", tmp_path / "w.pt")
    assert "1 selection biases, which steer the choice" in line
    assert "--drop-selection-bias" in line
    assert not (tmp_path / "w.pt").exists()
    convert(tmp_path / "w.safetensors", tmp_path / "w.pt", "--drop-selection-bias")
    assert "1 selection biases: the model will choose other experts" in capsys.readouterr().out
    assert not any("selection_bias" in name for name in torch.load(tmp_path / "w.pt", weights_only=True))


def test_gates_that_published_code_would_not_renormalise_are_refused(tmp_path, capsys):
    made = plan()
    model = dataclasses.replace(made.recipe.model, renormalize=True)
    write_weights(
        tmp_path / "w.safetensors", dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, model=model))
    )
    assert "does not renormalise the gates" in refused(capsys, tmp_path / "w.safetensors", tmp_path / "w.pt")


@pytest.fixture
def dit(tmp_path):
    torch.save(weights(SMALL["dit"]), tmp_path / "dit.pt")
    return tmp_path / "dit.pt"


MISTAKES = [
    (["{dit}", "{dir}/o.bin", "--from", "dit", "--heads", "2"], "ends in '.bin'"),
    (["{dit}", "{dit}", "--from", "dit", "--heads", "2"], "exists already"),
    (["{dit}", "{dir}/o.pt", "--to", "dsmoe", "--from", "dit", "--heads", "2"], "ends in .safetensors"),
    (["{dit}", "{dir}/o.safetensors", "--from", "dat"], "unknown --from 'dat'. Did you mean 'dit'"),
    (["{dit}", "{dir}/o.pt", "--to", "dat", "--from", "dit", "--heads", "2"], "unknown --to 'dat'"),
    (["{dit}", "{dir}/o.safetensors", "--objective", "dpm"], "unknown --objective 'dpm'"),
    (["{dit}", "{dir}/o.pt", "--to", "dit-moe", "--from", "dit", "--heads", "2"], "these are dense"),
    (["{dit}", "{dir}/o.pt", "--to", "generalist", "--from", "dit", "--heads", "2"], "one patch convolution a task"),
    (["{dit}", "{dir}/o.pt", "--dtype", "int8", "--from", "dit", "--heads", "2"], "unknown --dtype 'int8'"),
    (["{dit}", "{dir}/o.pt", "--kind", "ema", "--from", "dit", "--heads", "2"], "unknown --kind 'ema'"),
    (["{dit}", "{dir}/o.pt", "--size", "100", "--from", "dit", "--heads", "2"], "multiple of 16"),
    (["{dit}", "{dir}/o.pt", "--label-map", "{dir}/none.txt", "--from", "dit"], "cannot read label map"),
    (["{dit}", "{dir}/o.pt", "--codec", "kl-small", "--from", "dit", "--heads", "2", "--codec-path", "x"], "x"),
    (["{dir}/none.pt", "{dir}/o.pt"], "does not exist"),
    (["x" * 300, "{dir}/o.pt"], "File name too long"),
    (["{dir}", "{dir}/o.pt"], "holds no weights"),
    (["{dit}", "{dir}/no/such/o.pt", "--from", "dit", "--heads", "2"], "cannot be written"),
    (["{dir}/text", "{dir}/o.pt"], "neither a torch file nor safetensors"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_one_line_and_leave_nothing(dit, tmp_path, capsys, words, message):
    (tmp_path / "text").write_text("hello")
    before = sorted(p.name for p in tmp_path.iterdir())
    places = {"{dit}": str(dit), "{dir}": str(tmp_path)}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    assert message in refused(capsys, *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_weights_with_a_plan_take_no_guesses(tmp_path, capsys):
    write_weights(tmp_path / "w.safetensors", plan())
    assert "carries dsmoe's own plan" in refused(capsys, tmp_path / "w.safetensors", tmp_path / "o.pt", "--heads", 4)


def test_class_names_ride_along(dit, tmp_path):
    (tmp_path / "names.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    convert(dit, tmp_path / "o.safetensors", "--from", "dit", "--heads", 2, "--label-map", tmp_path / "names.txt")
    names = load_weights(tmp_path / "o.safetensors").plan.data.class_names
    assert names[:3] == ("tench", "goldfish", "2")
    assert len(names) == 1000


def test_neither_deepspeed_nor_diffusers_is_needed(dit, tmp_path):
    program = (
        "import sys\nfor name in ('deepspeed', 'diffusers', 'transformers'): sys.modules[name] = None\n"
        "from dsmoe.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["convert", str(dit), str(tmp_path / "o"), "--from", "dit", "--heads", "2"]
    result = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
