"""launchers/sample.py: the images are the ones asked for, errors are one line, nothing is half written."""

import argparse
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_harness import assert_succeeded, launch
from PIL import Image
from safetensors.torch import save_file

from dsmoe.base.diffusion import DiffusionSpec
from dsmoe.base.errors import CheckpointError, ConfigError
from dsmoe.base.plan import Plan
from dsmoe.data.transforms import to_uint8
from dsmoe.evaluation import draw as module
from dsmoe.evaluation.draw import (
    choose_classes,
    choose_sampling,
    describe,
    find_weights,
    image_numbers,
    main,
    sheet_layout,
)
from dsmoe.ops import random
from dsmoe.tasks.class_sampling import sampling_of

NAMES = ("ball", "cube", "1", "gem")


def _draw(run: Path, tmp_path: Path, *extra: str) -> dict[str, np.ndarray]:
    npz = tmp_path / "images.npz"
    argv = ["--checkpoint", str(run), "--out", str(tmp_path / "o.png"), "--npz", str(npz), *extra]
    assert main(argv, "", environ={}) == 0
    with np.load(npz) as file:
        return dict(file)


def _refused(argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line that a refused command prints."""
    assert main(argv, "", environ={}) == 2
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if line.startswith("dsmoe: ")]
    assert len(lines) == 1
    assert "Traceback" not in printed.err
    return lines[0]


# --- which images ---


def test_a_model_without_noise_gives_the_scaled_start_of_each_image_number(zero_run: Path, tmp_path: Path) -> None:
    """With a noise estimate of zero DDIM ends at x_T / sqrt(alpha_bar_T), whatever the steps and the guidance.

    alpha_bar_T of the linear schedule is prod(1 - beta), beta from 1e-4 to 0.02 (DDPM section 4).
    """
    got = _draw(zero_run, tmp_path, "--per-class", "2", "--classes", "c,a", "--steps", "3", "--seed", "5")
    numbers = torch.tensor([2, 5, 0, 3])  # j * 3 + class
    assert got["labels"].tolist() == [2, 2, 0, 0]
    assert got["numbers"].tolist() == numbers.tolist()
    alpha_bar = np.prod(1 - np.linspace(1e-4, 0.02, 1000))
    start = random.normal(5, "sample_noise", numbers, (3, 32, 32))
    expected = to_uint8(start / alpha_bar**0.5).permute(0, 2, 3, 1).numpy()
    assert got["arr_0"].dtype == np.uint8
    # fp32 rounding of values around 1e2 to 1e4 may cross the border between two levels.
    assert np.abs(got["arr_0"].astype(int) - expected).max() <= 1
    assert (got["arr_0"] == expected).mean() > 0.999


def test_an_image_does_not_depend_on_what_else_is_drawn(run_folder: Path, tmp_path: Path) -> None:
    everything = _draw(run_folder, tmp_path, "--per-class", "3")
    alone = _draw(run_folder, tmp_path, "--per-class", "2", "--classes", "b")
    chosen = everything["labels"] == 1
    assert everything["labels"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    # Batches of other sizes may add up in another order.
    difference = everything["arr_0"][chosen][:2].astype(int) - alone["arr_0"]
    assert np.abs(difference).max() <= 1
    assert not np.array_equal(alone["arr_0"][0], alone["arr_0"][1])


def test_numbers_are_those_of_a_training_sheet() -> None:
    """A sheet draws image i of label i mod classes with number i."""
    labels = torch.arange(20) % 7
    assert torch.equal(image_numbers(labels, torch.arange(20) // 7, 7), torch.arange(20))


def flow_plan(plan: Plan, **report: object) -> Plan:
    """The plan as one of a model trained on rectified flow."""
    spec = DiffusionSpec(prediction="velocity", schedule="rectified_flow")
    report = dataclasses.replace(plan.recipe.report, **report)
    return dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, diffusion=spec, report=report))


def test_a_model_without_velocity_leaves_the_start_of_each_image_number(tmp_path: Path, abc_plan, write_run) -> None:
    """Rectified flow is walked by Euler, t from 1 on, without being told: x_1 - 0 is the image."""
    run = write_run(tmp_path / "flow", flow_plan(abc_plan()), zero=True)
    got = _draw(run, tmp_path, "--per-class", "1", "--steps", "3")
    expected = to_uint8(random.normal(7, "sample_noise", torch.tensor([0, 1, 2]), (3, 32, 32))).permute(0, 2, 3, 1)
    assert np.array_equal(got["arr_0"], expected.numpy())


OPTIONS = [
    ("--seed", "8"), ("--guidance", "1"), ("--steps", "4"), ("--sampler", "ancestral"), ("--spacing", "leading"),
    ("--spacing", "linspace"), ("--eta", "1"),
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS, ids=" ".join)
def test_options_reach_the_sampler(run_folder: Path, tmp_path: Path, option: tuple[str, str]) -> None:
    plain = _draw(run_folder, tmp_path, "--per-class", "1")
    other = _draw(run_folder, tmp_path, "--per-class", "1", *option)
    again = _draw(run_folder, tmp_path, "--per-class", "1", *option)
    assert not np.array_equal(plain["arr_0"], other["arr_0"])
    assert np.array_equal(again["arr_0"], other["arr_0"])


def _options(**given: object) -> argparse.Namespace:
    names = ("sampler", "steps", "spacing", "eta", "guidance", "cfg_channels", "seed")
    return argparse.Namespace(**(dict.fromkeys(names) | given))


def test_sampling_is_the_runs_own_where_nothing_is_given(abc_plan) -> None:
    plan = abc_plan()
    assert choose_sampling(plan, _options()) == sampling_of(plan)
    changed = choose_sampling(plan, _options(steps=9, seed=0, cfg_channels=3))
    assert (changed.steps, changed.seed, changed.cfg_channels) == (9, 0, 3)
    assert (changed.guidance, changed.sampler) == (3.0, "ddim")


def test_sampler_is_that_of_the_schedule_unless_the_recipe_says(abc_plan) -> None:
    plan = abc_plan()
    assert sampling_of(flow_plan(plan)).sampler == "euler"
    report = dataclasses.replace(plan.recipe.report, spacing="leading", eta=0.5)
    own = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, report=report))
    drawn = choose_sampling(own, _options())
    assert (drawn.sampler, drawn.spacing, drawn.eta) == ("ddim", "leading", 0.5)
    assert describe(drawn) == "ddim leading eta0.5, 2 steps, guidance 3 (channels all), seed 7"
    other = choose_sampling(own, _options(sampler="ancestral"))
    assert (other.sampler, other.spacing, other.eta) == ("ancestral", "trailing", 0.0), "they belong to ddim"
    assert choose_sampling(flow_plan(plan), _options(steps=5000)).steps == 5000, "continuous time has no last step"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"steps": 1001}, "1 to 1000"),
        ({"sampler": "euler"}, "sampler euler walks rectified_flow"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"sampler": "ancestral", "eta": 1.0}, "sampler ancestral takes none"),
        ({"sampler": "ancestral", "spacing": "leading"}, "sampler ancestral takes none"),
        ({"guidance": 0.5}, "--guidance is 0.5"),
        ({"guidance": float("nan")}, "--guidance is nan"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_sampling_values_that_cannot_be_are_refused(abc_plan, given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_sampling(abc_plan(), _options(**given))


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_discrete_samplers_are_refused_on_rectified_flow(abc_plan, sampler: str) -> None:
    with pytest.raises(ConfigError, match=f"sampler {sampler} walks discrete steps .* take euler"):
        choose_sampling(flow_plan(abc_plan()), _options(sampler=sampler))


def test_guidance_needs_an_unconditional_model(abc_plan) -> None:
    plan = abc_plan()
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, null_class=False))
    with pytest.raises(ConfigError, match="--guidance 1"):
        choose_sampling(plan, _options())
    assert choose_sampling(plan, _options(guidance=1.0)).guidance == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("all", [0, 1, 2, 3]), ("gem,ball", [3, 0]), ("3, cube ,3", [3, 1]), ("1", [2]), ("0", [0])],
)
def test_classes_by_name_and_number(text: str, expected: list[int]) -> None:
    assert choose_classes(text, NAMES) == expected


@pytest.mark.parametrize("text", ["", "4", "-1", "gen", "ball,,gem", "ALL"])
def test_unknown_classes_are_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="unknown class") as caught:
        choose_classes(text, NAMES)
    assert "ball, cube, 1, gem" in str(caught.value)


def test_a_thousand_class_names_do_not_fill_the_error_line() -> None:
    with pytest.raises(ConfigError, match=r"0\.\.999") as caught:
        choose_classes("dog", [f"n{i:08d}" for i in range(1000)])
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("classes", [1, 3, 16, 1000, 5000])
@pytest.mark.parametrize("per_class", [1, 2, 3, 5, 8, 9, 16, 17, 100, 50000])
def test_sheet_stays_readable(classes: int, per_class: int) -> None:
    shown, columns = sheet_layout(classes, per_class)
    assert 1 <= shown <= per_class
    assert shown == per_class or (shown + 1) * classes > 1024
    assert shown * classes <= max(1024, classes)
    assert columns <= 16
    assert columns % shown == 0 or shown > 16


# --- which weights, which codec ---


def test_weights_of_a_run_or_a_file(run_folder: Path, tmp_path: Path) -> None:
    file = run_folder / "ckpt" / "ema.safetensors"
    assert find_weights(run_folder) == file
    assert find_weights(file) == file
    with pytest.raises(CheckpointError, match="holds no ckpt/ema"):
        find_weights(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        find_weights(tmp_path / "nothing")


def test_another_codec_than_the_trained_one_is_refused(tmp_path: Path, abc_plan, write_run, capsys) -> None:
    run = write_run(tmp_path / "r", abc_plan(codec={"name": "none", "sha256": "0ther", "scale": "1.0", "factor": "1"}))
    line = _refused(["--checkpoint", str(run)], capsys)
    assert "sha256 0ther" in line
    assert "sha256 none" in line
    assert not (run / "samples").exists()


# --- the command ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--checkpoint is missing"),
        (["--checkpoint", "{run}/nowhere"], "does not exist"),
        (["--checkpoint", "{run}/plan.json"], "damaged or not safetensors"),
        (["--checkpoint", "{run}/foreign.safetensors"], "carries no dsmoe plan"),
        (["--checkpoint", "{run}", "--classes", "q"], "unknown class 'q'"),
        (["--checkpoint", "{run}", "--per-class", "0"], "--per-class is 0"),
        (["--checkpoint", "{run}", "--steps", "many"], "--steps: invalid int"),
        (["--checkpoint", "{run}", "--sampler", "heun"], "invalid choice: 'heun'"),
        (["--checkpoint", "{run}", "--sampler", "euler"], "take ddim"),
        (["--checkpoint", "{run}", "--spacing", "even"], "invalid choice: 'even'"),
        (["--checkpoint", "{run}", "--eta", "2"], "eta is 2.0"),
        (["--checkpoint", "{run}", "--cfg-channels", "2"], "'2' is neither 3 nor all"),
        (["--checkpoint", "{run}", "--out", "{run}/x.jpg"], "must end in .png"),
        (["--checkpoint", "{run}", "--out", "{run}/plan.json/x.png"], "cannot be written"),
        (["--checkpoint", "{run}", "--npz", "{run}/x"], "must end in .npz"),
        (["--checkpoint", "{run}", "--out", "/proc/x.png"], "cannot be written"),
        (["--checkpoint", "x" * 300], "File name too long"),
        (["--checkpoints", "{run}"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_one_line_and_code_2(run_folder: Path, argv: list[str], message: str, capsys) -> None:
    save_file({"a": torch.zeros(1)}, run_folder / "foreign.safetensors")
    assert message in _refused([word.replace("{run}", str(run_folder)) for word in argv], capsys)
    assert not (run_folder / "samples").exists() or not any((run_folder / "samples").iterdir())


def test_a_broken_launch_environment_is_one_line_of_rank_0(run_folder: Path, capsys) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        assert main(["--checkpoint", str(run_folder)], "", environ={"RANK": rank}) == 2
        assert capsys.readouterr().err.count("\n") == lines


def test_a_fault_of_ours_is_told_with_its_traceback_and_code_1(run_folder: Path, monkeypatch, capsys) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the sky fell")

    monkeypatch.setattr(module, "open_trained", broken)
    assert main(["--checkpoint", str(run_folder)], "", environ={}) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "dsmoe: RuntimeError: the sky fell" in printed


def test_sheet_lies_in_the_run_and_its_place_is_told(run_folder: Path, capsys) -> None:
    assert main(["--checkpoint", str(run_folder), "--per-class", "4"], "", environ={}) == 0
    files = list((run_folder / "samples").iterdir())
    assert [f.name for f in files] == ["ema-000001234-ddim2-g3-seed7.png"]
    assert str(files[0]) in capsys.readouterr().err
    with Image.open(files[0]) as sheet:
        # 3 classes of 4 in rows of 8: 8 tiles of 32 px enlarged three times, 14 px captions, 4 px margins.
        assert sheet.size == (8 * 100 + 4, 2 * (96 + 14 + 4) + 4)


def test_a_file_outside_a_run_gets_its_sheet_beside_it(run_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere" / "w.safetensors"
    file.parent.mkdir()
    (run_folder / "ckpt" / "ema.safetensors").rename(file)
    assert main(["--checkpoint", str(file), "--per-class", "1"], "", environ={}) == 0
    assert sorted(p.suffix for p in file.parent.iterdir()) == [".png", ".safetensors"]


def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new(run_folder, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "o" / "sheet.png"
    out.parent.mkdir()
    out.write_bytes(b"old")

    def save(_: Image.Image, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    line = _refused(["--checkpoint", str(run_folder), "--per-class", "1", "--out", str(out)], capsys)
    assert "No space left" in line
    assert out.read_bytes() == b"old"
    assert list(out.parent.iterdir()) == [out]


_WITHOUT_DEEPSPEED = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "mpi4py"):
            raise ImportError(f"{name} is not to be imported here")

sys.meta_path.insert(0, Refuse())
sys.argv = ["sample.py", *sys.argv[1:]]
runpy.run_path("launchers/sample.py", run_name="__main__")
"""


def test_launcher_needs_no_deepspeed(run_folder: Path, repo_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_DEEPSPEED, "--checkpoint", str(run_folder), "--per-class", "1"],
        cwd=repo_root,
        env={"PATH": "", "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"samples .*ema-000001234", done.stderr)


@pytest.mark.distributed
def test_ranks_share_the_work_and_give_the_same_images(run_folder: Path, tmp_path: Path) -> None:
    alone = _draw(run_folder, tmp_path, "--per-class", "1")
    argv = ["launchers/sample.py", "--local_rank=0", "--checkpoint", run_folder, "--per-class", "1"]
    results = launch([*argv, "--out", tmp_path / "two.png", "--npz", tmp_path / "two.npz"], 2)
    assert_succeeded(results)
    with np.load(tmp_path / "two.npz") as file:
        shared = dict(file)
    assert shared["labels"].tolist() == [0, 1, 2]
    assert np.abs(shared["arr_0"].astype(int) - alone["arr_0"]).max() <= 1
    assert (tmp_path / "two.png").exists()
    assert results[1].stdout + results[1].stderr == ""


@pytest.mark.distributed
def test_ranks_stop_together_when_rank_0_cannot_write(run_folder: Path) -> None:
    argv = ["launchers/sample.py", "--checkpoint", run_folder, "--per-class", "1", "--out", "/proc/x.png"]
    results = launch(argv, 2, timeout=60, preloaded=True)
    assert [r.returncode for r in results] == [2, 2]
    assert not any(r.killed for r in results)
    assert [r.stderr.count("dsmoe: --out /proc/x.png cannot be written") for r in results] == [1, 0]
