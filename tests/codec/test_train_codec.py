"""launchers/train_codec.py: options, messages, files. What it trains is tested in test_fit."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsmoe.codec import build
from dsmoe.data.scenes import Scenes
from launchers import train_codec

_TINY = ["--resolution", "32", "--scenes", "16", "--images", "64"]


def test_trains_writes_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train_codec.main([*_TINY, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "64 images (100.0 %)" in printed
    assert "PSNR" in printed
    assert "0 min left" in printed
    record = json.loads((out / train_codec.LOG_FILE).read_text().splitlines()[-1])
    assert record["images"] == 64
    codec = build("kl-small", out / train_codec.WEIGHTS_FILE)
    weights = (out / train_codec.WEIGHTS_FILE).read_bytes()

    assert train_codec.main([*_TINY, "--out", str(out)]) == 2
    assert "add --resume" in capsys.readouterr().err
    assert train_codec.main([*_TINY, "--out", str(out), "--resume"]) == 0
    assert (out / train_codec.WEIGHTS_FILE).read_bytes() == weights
    assert train_codec.main([*_TINY, "--seed", "5", "--out", str(out), "--resume"]) == 2
    assert "seed 0 (now 5)" in capsys.readouterr().err
    assert codec.factor == 8


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--resolution", "60"], "--resolution 60 is not a multiple of 8"),
        (["--scenes", "3"], "--scenes 3 is too few"),
        (["--images", "-4"], "length of the training is -4"),
        (["--resume"], "holds no state.safetensors"),
        (["--resolution", "8"], "resolution 8"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_codec.main([*argv, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert train_codec.main([*_TINY, "--out", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_label_pictures() -> None:
    frames = Scenes("train", 32).read_full(3)
    depth, flow, cut_out, mask = (train_codec.label_picture(frames, i) for i in range(4))
    for picture in (depth, flow, cut_out, mask):
        assert picture.shape == (32, 32, 3)
        assert picture.dtype == np.uint8
    for grey in (depth, flow, mask):
        assert (grey == grey[..., :1]).all()
    order = np.argsort(frames.depth, axis=None, kind="stable")
    assert (np.diff(depth[..., 0].reshape(-1)[order].astype(int)) >= 0).all()
    assert depth.min() == 0
    assert depth.max() == 255
    assert set(np.unique(mask)) <= {0, 255}
    assert (cut_out[~frames.visible] == 255).all()
    assert (cut_out[frames.visible] == frames.image[frames.visible]).all()
    still = np.abs(frames.flow[..., 0]) < 1e-3
    assert (np.abs(flow[..., 0][still].astype(int) - 127.5) <= 1).all()
