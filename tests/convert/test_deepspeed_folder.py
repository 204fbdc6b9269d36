"""Folders that DeepSpeed itself wrote, read without it: exact fp32 masters, whatever the stage."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_harness import assert_succeeded, launch
from safetensors.torch import load_file

from dsmoe.__main__ import main
from dsmoe.base.errors import CheckpointError
from dsmoe.checkpoint.weights import load_weights
from dsmoe.convert.deepspeed_folder import deepspeed_source, find_step

pytestmark = pytest.mark.distributed
CELLS = ("z0", "z1", "z2_bf16", "z3_bf16", "z1_ep2")
SIZE = ["--size", "32", "--heads", "2", "--objective", "v", "--trust-pickle"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One start of two ranks makes all folders."""
    folder = tmp_path_factory.mktemp("deepspeed")
    assert_succeeded(launch([Path(__file__).with_name("deepspeed_folders.py"), folder], 2, timeout=240, preloaded=True))
    return folder


def test_every_stage_gives_the_exact_master_weights(made):
    for cell in CELLS:
        tensors, samples, about = deepspeed_source(find_step(made / cell), inert=True)
        expected = load_file(made / f"{cell}.safetensors")
        assert tensors.keys() == expected.keys(), cell
        for name, value in expected.items():
            assert tensors.outline[name].shape == value.shape, (cell, name)
            assert torch.equal(tensors[name].float(), value), (cell, name)
        assert samples == 4, cell
        assert ("masters of 2 ranks" in about) == (cell != "z0"), cell
        if "bf16" in cell:  # masters, not the model's rounded weights
            assert any(not torch.equal(value, value.bfloat16().float()) for value in expected.values()), cell


def test_a_folder_is_converted_without_deepspeed_and_only_when_asked_for(made, tmp_path, capsys):
    """The dense perception model: its frozen pos_embed is looked at and left out."""
    source, out = made / "z3_bf16", tmp_path / "w.safetensors"
    untrusting = [word for word in SIZE if word != "--trust-pickle"]
    assert main(["convert", str(source), str(out), *untrusting, "--num-classes", "5"]) == 2
    line = capsys.readouterr().err
    assert "deepspeed.runtime.zero.config.ZeroStageEnum" in line
    assert "--trust-pickle" in line
    assert line.count("\n") == 1
    program = (
        "import sys; sys.modules['deepspeed'] = None\nfrom dsmoe.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "convert", str(source), str(out), *SIZE, "--num-classes", "5"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "DeepSpeed checkpoint, ZeRO-3, fp32 masters of 2 ranks" in result.stdout
    found, expected = load_weights(out), load_file(made / "z3_bf16.safetensors")
    del expected["pos_embed"]
    assert found.state.keys() == expected.keys()
    assert all(torch.equal(found.state[name], expected[name]) for name in expected)
    assert (found.images_seen, found.plan.recipe.model.tasks, found.plan.recipe.model.conditions) == (4, 2, 1)


def test_experts_of_other_ranks_come_from_their_files(made, tmp_path):
    """Our keys without a plan: what they were trained for must be said."""
    out = tmp_path / "w.safetensors"
    words = ["--heads", "2", "--top-k", "2", "--num-classes", "5", "--trust-pickle"]
    assert main(["convert", str(made / "z1_ep2"), str(out), *words, "--size", "32"]) == 2
    assert main(["convert", str(made / "z1_ep2"), str(out), *words, "--size", "32", "--objective", "ddpm"]) == 0
    expected = load_file(made / "z1_ep2.safetensors")
    found = load_weights(out)
    assert found.state.keys() == expected.keys()
    assert all(torch.equal(found.state[name], expected[name]) for name in expected)


@pytest.fixture
def copied(made, tmp_path):
    shutil.copytree(made / "z2_bf16", tmp_path / "z")
    return tmp_path / "z"


def test_an_incomplete_or_mixed_folder_is_named(copied):
    step = find_step(copied)
    other = step / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(other, step / other.name.removeprefix("bf16_"))
    with pytest.raises(CheckpointError, match="holds both"):
        deepspeed_source(step, inert=True)
    (step / other.name.removeprefix("bf16_")).unlink()
    other.unlink()
    with pytest.raises(CheckpointError, match="written by 2 ranks and holds 1"):
        deepspeed_source(step, inert=True)
    torch.save({"module": {}, "param_shapes": 3}, step / "mp_rank_00_model_states.pt")
    shutil.copy(step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", other)
    with pytest.raises(CheckpointError, match="not laid out as DeepSpeed writes it"):
        deepspeed_source(step, inert=True)
    (copied / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="no folder beside it"):
        find_step(copied)
