"""launchers/sample.py draws from weights of any origin, and the same images as from the converted file."""

import dataclasses
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from convert.published import SMALL, forward, weights
from distributed_harness import assert_succeeded, launch

from dsmoe.__main__ import main
from dsmoe.checkpoint.weights import load_weights
from dsmoe.data.transforms import to_uint8
from dsmoe.ops import random
from dsmoe.runtime import logging

LAUNCHER = Path(__file__).resolve().parents[2] / "launchers" / "sample.py"
# Pixel space: three channels and the codec without weights, so that an image is the latent itself.
PIXELS = {"inputs": 3, "outputs": 6, "rows": 6}
DIT = dataclasses.replace(SMALL["dit"], **PIXELS)
FLASH = dataclasses.replace(SMALL["dit-moe-flash"], **PIXELS)
CASES = {
    "dit": (DIT, ["--from", "dit", "--heads", "2"]),
    "sit": (DIT, ["--from", "sit", "--heads", "2"]),
    "flash": (FLASH, ["--top-k", "2"]),
}


@pytest.fixture(autouse=True)
def _restore_logging():
    yield
    logging.configure(stream=sys.__stderr__)


def sample(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(LAUNCHER), run_name="__main__")
    return end.value.code


def draw(monkeypatch, tmp_path, checkpoint, *words):
    out = tmp_path / "images.npz"
    common = ["--out", tmp_path / "o.png", "--npz", out, "--steps", "2", "--classes", "0,3", "--per-class", "1"]
    assert sample(monkeypatch, "--checkpoint", checkpoint, *common, *words) == 0
    with np.load(out) as file:
        return torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", CASES)
def test_a_published_file_and_its_conversion_give_the_same_images(name, tmp_path, monkeypatch):
    kind, words = CASES[name]
    torch.save(weights(kind), tmp_path / "w.pt")
    first = draw(monkeypatch, tmp_path, tmp_path / "w.pt", "--codec", "none", *words)
    assert main(["convert", str(tmp_path / "w.pt"), str(tmp_path / "w.safetensors"), "--codec", "none", *words]) == 0
    assert torch.equal(draw(monkeypatch, tmp_path, tmp_path / "w.safetensors"), first)
    assert first.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("name", ["sit", "flash"])
def test_the_walk_is_the_published_codes_own(name, tmp_path, monkeypatch):
    """Two Euler steps without guidance, by hand: DiT-MoE from t = 1 down by -v, SiT from t = 0 up by +v."""
    kind, words = CASES[name]
    state = {key: value * 0.5 for key, value in weights(kind).items()} | {"pos_embed": weights(kind)["pos_embed"]}
    torch.save(state, tmp_path / "w.pt")
    got = draw(monkeypatch, tmp_path, tmp_path / "w.pt", "--codec", "none", "--guidance", "1", *words)
    labels = torch.tensor([0, 3])
    x = random.normal(0, "sample_noise", labels, (3, 8, 8)).double()
    for step in range(2):
        told = torch.full((2,), 1 - step / 2 if name == "flash" else step / 2, dtype=torch.float64)
        velocity = forward(state, kind, x, told, labels)[:, :3]
        x = x - velocity / 2 if name == "flash" else x + velocity / 2
    difference = got.int() - to_uint8(x.float()).int()
    assert difference.abs().max() <= 1  # fp32 against fp64, across a border between two levels
    assert (difference == 0).double().mean() > 0.98


def test_names_on_the_sheet_come_from_the_label_map(tmp_path, monkeypatch):
    torch.save(weights(FLASH), tmp_path / "w.pt")
    (tmp_path / "names.json").write_text('["tench", "goldfish", "shark", "ray, manta", "cock"]')
    words = ["--checkpoint", tmp_path / "w.pt", "--codec", "none", "--top-k", "2", "--steps", "1", "--per-class", "1"]
    words += ["--label-map", tmp_path / "names.json", "--out", tmp_path / "o.png"]
    assert sample(monkeypatch, *words, "--classes", "ray,shark") == 0
    assert (tmp_path / "o.png").exists()
    (tmp_path / "names.json").write_text("[1, 2]")
    assert sample(monkeypatch, *words, "--classes", "ray") == 2


def test_mistakes_are_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    torch.save(weights(SMALL["generalist"]), tmp_path / "g.pt")
    torch.save(weights(SMALL["dit"]), tmp_path / "w.pt")
    cases = [
        (["--checkpoint", tmp_path / "w.pt"], "do not show their number of attention heads"),
        (["--checkpoint", tmp_path / "w.pt", "--heads", "2"], "DiT, fast-DiT and SiT share"),
        (["--checkpoint", tmp_path / "w.pt", "--heads", "2", "--from", "dit", "--codec", "none"], "3 channels"),
        (
            ["--checkpoint", tmp_path / "g.pt", "--heads", "2", "--top-k", "2", "--objective", "v"],
            "draws from latents of other images",
        ),
        (["--checkpoint", tmp_path / "nothing"], "does not exist"),
        (["--checkpoint", tmp_path], "holds no weights"),
    ]
    for words, message in cases:
        assert sample(monkeypatch, *words) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dsmoe: ")]
        assert len(lines) == 1
        assert message in lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.pt", "w.pt"]


def test_weights_too_large_for_this_host_are_told_to_be_converted(tmp_path, monkeypatch, capsys):
    torch.save(weights(FLASH), tmp_path / "w.pt")
    monkeypatch.setattr("dsmoe.runtime.device.Device.total_memory_bytes", lambda self: 1000)
    assert sample(monkeypatch, "--checkpoint", tmp_path / "w.pt", "--codec", "none", "--top-k", "2") == 2
    assert "convert it first: python -m dsmoe convert" in capsys.readouterr().err


def test_a_moved_codec_is_pointed_to_and_another_one_is_refused(tmp_path, monkeypatch, capsys):
    """kl-small from a copy elsewhere; the plan knows its hash."""
    from dsmoe.codec import kl

    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(Path(kl.WEIGHTS).read_bytes())
    channels = kl.KLCodec().channels
    kind = dataclasses.replace(DIT, inputs=channels, outputs=2 * channels)
    torch.save(weights(kind), tmp_path / "w.pt")
    words = ["--from", "dit", "--heads", "2", "--codec", "kl-small", "--codec-path", str(moved)]
    assert main(["convert", str(tmp_path / "w.pt"), str(tmp_path / "w.safetensors"), *words]) == 0
    assert len(load_weights(tmp_path / "w.safetensors").plan.codec["sha256"]) == 64
    first = draw(monkeypatch, tmp_path, tmp_path / "w.safetensors")
    moved.rename(tmp_path / "again.safetensors")
    assert sample(monkeypatch, "--checkpoint", tmp_path / "w.safetensors", "--steps", "2") == 2
    again = draw(monkeypatch, tmp_path, tmp_path / "w.safetensors", "--codec-path", tmp_path / "again.safetensors")
    assert torch.equal(first, again)
    capsys.readouterr()
    assert sample(monkeypatch, "--checkpoint", tmp_path / "w.safetensors", "--codec", "none") == 2
    assert "give --codec another" in capsys.readouterr().err


@pytest.mark.distributed
def test_two_ranks_share_the_drawing_of_foreign_weights(tmp_path, monkeypatch):
    torch.save(weights(FLASH), tmp_path / "w.pt")
    words = ["--checkpoint", tmp_path / "w.pt", "--codec", "none", "--top-k", "2", "--steps", "2", "--per-class", "1"]
    words += ["--classes", "0,3", "--out", tmp_path / "two.png", "--npz", tmp_path / "two.npz"]
    assert_succeeded(launch([LAUNCHER, *words], 2, preloaded=True))
    alone = draw(monkeypatch, tmp_path, tmp_path / "w.pt", "--codec", "none", "--top-k", "2").int()
    with np.load(tmp_path / "two.npz") as file:
        together = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2).int()
    assert (alone - together).abs().max() <= 1  # batches of other sizes add up in another order
