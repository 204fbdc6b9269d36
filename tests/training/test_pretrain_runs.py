"""Whole runs of the launcher on two CPU processes: what a run folder holds afterwards, and how runs end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_harness import assert_succeeded, launch
from PIL import Image

from dsmoe.checkpoint.weights import build_model, load_weights
from dsmoe.runtime.launch_environment import free_port

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "codec.name=none", "model.preset=nano-4E2A", "model.depth=2", "model.dim=32", "model.heads=2", "model.patch=4",
    "train.global_batch=8", "optimizer.warmup_images=16", "report.log_every=16", "report.samples=6",
    "report.sample_steps=3", "ema.half_life_images=20",
]  # fmt: skip


def engine(tmp_path, stage, block=(), **more):
    """A ds_config file of this ZeRO stage."""
    config = {"dsmoe": {"about": "test", **dict(block)}, "zero_optimization": {"stage": stage}, **more}
    path = tmp_path / f"zero{stage}.json"
    path.write_text(json.dumps(config))
    return path


COUNT_CHILDREN = """
import multiprocessing, sys
from dsmoe.training.pretrain import main
code = main(sys.argv[1:], "")
print("CHILDREN", len(multiprocessing.active_children()))
sys.exit(code)
"""


def run(config, folder, *overrides, world=2, program=(ROOT / "launchers/pretrain.py",)):
    argv = [*program, "--deepspeed_config", config, "--run", folder, *TINY, *overrides]
    return launch(argv, world, timeout=150, preloaded=True)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_zero3_bf16_run_leaves_a_whole_run_folder_and_repeats_as_done(tmp_path):
    config = engine(
        tmp_path, 3, {"activation_checkpointing": True, "expert_parallel_size": 2},
        bf16={"enabled": True}, gradient_accumulation_steps=2,
    )  # fmt: skip
    science = ("data.resolution=32", "data.size=32", "train.images=160", "report.sample_every=80")
    folder = tmp_path / "run"
    assert_succeeded(run(config, folder, *science))

    rows = records(folder)
    assert [r["images_seen"] for r in rows] == [8, 16, *range(32, 161, 16)]
    assert all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 and 0 <= r["data_share"] <= 1 for r in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {p.name for p in (folder / "samples").iterdir()} == {"images-000000080.png", "images-000000160.png"}
    assert json.loads((folder / "DONE").read_text())["images_seen"] == 160
    assert not (folder / "FAILED").exists()
    assert list((folder / "tb").iterdir())
    assert (folder / "loss.png").stat().st_size > 1000
    assert {p.name for p in (folder / "logs").iterdir()} == {"rank00000.log", "rank00001.log"}

    average, last = (load_weights(folder / "ckpt" / f"{kind}.safetensors") for kind in ("ema", "model"))
    model = build_model(average)
    out, _ = model(torch.zeros(1, 3, 32, 32), torch.tensor([5.0]), torch.tensor([1]))
    assert torch.isfinite(out).all()
    assert out.abs().max() > 0, "the output layer starts at zero; training must have moved it"
    assert any(not torch.equal(average.state[n], last.state[n]) for n in average.state)
    assert all(t.dtype == torch.float32 for t in average.state.values())

    again = run(config, folder, *science)
    assert_succeeded(again)
    assert "is DONE" in again[0].stderr
    assert records(folder) == rows


def photos(folder, classes=3, each=6, broken=0):
    """A class folder of smooth random pictures, `broken` of them damaged."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True)
        for i in range(each):
            small = rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(small).resize((60, 50)).save(folder / f"class{c}" / f"{i}.png")
    for i in range(broken):
        (folder / "class0" / f"{i}.png").write_bytes(b"not a picture")
    return folder


def test_image_folder_with_loader_processes_trains_and_names_skipped_files(tmp_path):
    path = photos(tmp_path / "photos", broken=1)
    folder = tmp_path / "run"
    config = engine(tmp_path, 2, {"data_workers": 1})
    results = run(
        config, folder, "data.source=image_folder", f"data.path={path}", "data.size=null", "data.resolution=32",
        "data.max_bad_fraction=0.5", "codec.cache=none", "train.images=96", program=("-c", COUNT_CHILDREN),
    )  # fmt: skip
    assert_succeeded(results)
    # A worker left to the interpreter's exit may be waited for without end: it ignores SIGTERM.
    assert all("CHILDREN 0" in r.stdout for r in results)
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["data"] == {"items": 18, "class_names": ["class0", "class1", "class2"]}
    assert "skipped 1 damaged images, the first: class0/0.png" in results[0].stderr


def test_too_many_damaged_files_end_the_run_with_the_reason(tmp_path, subtests):
    path = photos(tmp_path / "photos", classes=2, each=24, broken=20)
    for cache in ("none", "memory"):
        with subtests.test(cache=cache):
            folder = tmp_path / cache
            results = run(
                engine(tmp_path, 1), folder, "data.source=image_folder", f"data.path={path}", "data.size=null",
                "data.resolution=32", f"codec.cache={cache}", "train.images=480",
            )  # fmt: skip
            assert 2 in [r.returncode for r in results]
            assert all(r.returncode != 0 for r in results)
            line = (folder / "FAILED").read_text()
            assert "class0/" in line
            assert "data.max_bad_fraction" in line
            assert not (folder / "DONE").exists()


def test_the_quick_start_command_in_small(tmp_path):
    """The documented command with fewer images: the real launcher, recipe, ds_config and codec."""
    folder = tmp_path / "run"
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "LOCAL_", "WORLD_", "MASTER_"))}
    path = os.pathsep.join(p for p in (str(ROOT), environ.get("PYTHONPATH", "")) if p)
    environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [
            sys.executable, Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2",
            "--master_port", str(free_port()), "launchers/pretrain.py",
            "--deepspeed_config", "ds_configs/quickstart.json", "--run", folder,
            "data.size=64", "train.images=2560", "optimizer.warmup_images=320", "report.log_every=640",
            "report.sample_every=1280", "report.samples=16", "report.sample_steps=5", "checkpoint.every=1280",
        ],
        cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["codec"]["name"], plan["engine"]["world_size"], plan["model"]["num_classes"]) == ("kl-small", 2, 16)
    losses = [row["mse"] for row in records(folder)]
    assert losses[-1] < 0.6 < losses[0]  # noise predicted as zero gives 1; these 40 steps bring it to 0.33
    assert {p.name for p in (folder / "samples").iterdir()} == {"images-000001280.png", "images-000002560.png"}
    sheet = np.asarray(Image.open(folder / "samples/images-000002560.png"))
    assert sheet.std() > 10, "a sheet without pictures"
    assert (folder / "ckpt/images-000001280/state.json").exists()
    assert (folder / "DONE").exists()
    assert "next         python launchers/sample.py" in done.stdout + done.stderr
