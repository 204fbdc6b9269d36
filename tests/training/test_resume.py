"""A run that is stopped or killed goes on with the same command as if nothing had happened, in any layout."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from distributed_harness import assert_succeeded, launch
from safetensors.torch import load_file

from dsmoe.checkpoint.reader import read_state
from dsmoe.checkpoint.store import Store
from dsmoe.runtime.stopping import StopRequest

SCRIPT = Path(__file__).with_name("interrupted_run.py")
STEPS, BATCH = 12, 8
SCIENCE = [
    "codec.name=none", "model.preset=nano-4E2A", "model.depth=2", "model.dim=32", "model.heads=2", "model.patch=4",
    "data.resolution=32", "data.size=32", f"train.global_batch={BATCH}", f"train.images={STEPS * BATCH}",
    "optimizer.warmup_images=16", "optimizer.clip=1.0", "balance.scope=step", "ema.half_life_images=[20, 200]",
    "report.samples=2", "report.sample_steps=2", "report.log_every=24", "checkpoint.every=32", "checkpoint.keep=3",
]  # fmt: skip
FIGURES = ("step", "images_seen", "loss", "mse", "vb", "balance", "grad_norm", "lr", "load_entropy")


def run(folder, tmp_path, *, stage=1, world=2, interrupt=("SIGTERM", 0, 0)):
    config = tmp_path / f"zero{stage}.json"
    block = {"about": "test", "expert_parallel_size": world}
    config.write_text(json.dumps({"dsmoe": block, "zero_optimization": {"stage": stage}}))
    argv = [SCRIPT, *map(str, interrupt), "--deepspeed_config", config, "--run", folder, *SCIENCE]
    return launch(argv, world, timeout=150, preloaded=True)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(folder):
    return [{name: row[name] for name in FIGURES} for row in rows(folder)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run unbroken; one stopped, killed and resumed; that one resumed in another layout."""
    place = tmp_path_factory.mktemp("resume")
    whole, broken, moved = place / "whole", place / "broken", place / "moved"
    found = {"whole": whole, "broken": broken, "moved": moved}
    assert_succeeded(run(whole, place))
    found["stopped"] = run(broken, place, interrupt=("SIGUSR1", 1, 4))
    found["after_stop"] = {p.name for p in broken.iterdir()}, Store(broken / "ckpt").committed(), rows(broken)
    found["killed"] = run(broken, place, interrupt=("SIGKILL", 0, 7))
    found["after_kill"] = Store(broken / "ckpt").committed(), rows(broken)
    (broken / "ckpt" / ".tmp-000000064-of-the-dead").mkdir()
    shutil.copytree(broken, moved)
    found["resumed"] = run(broken, place)
    found["moved_run"] = run(moved, place, stage=3, world=1)
    return found


@pytest.mark.distributed
def test_a_signal_on_one_rank_or_a_kill_leaves_what_was_committed(runs, subtests):
    with subtests.test("a signal stops all ranks with a checkpoint"):
        assert [r.returncode for r in runs["stopped"]] == [75, 75]
        names, committed, records = runs["after_stop"]
        assert committed == [40, 32], "one step after the signal, and the interval before"
        assert not names & {"FAILED", "DONE"}
        assert [r["step"] for r in records] == [1, 3], "no row for the open window"
        assert "stopped as asked" in runs["stopped"][0].stderr
    with subtests.test("a killed run keeps what was committed"):
        assert -signal.SIGKILL in [r.returncode for r in runs["killed"]]
        assert "resumed at 40 images" in runs["killed"][0].stderr
        committed, records = runs["after_kill"]
        assert committed[-2:] == [40, 32]
        assert [r["step"] for r in records] in ([1, 3, 6, 9], [1, 3, 6])


@pytest.mark.distributed
def test_the_same_command_gives_the_unbroken_run_bit_by_bit(runs):
    assert_succeeded(runs["resumed"])
    assert "resumed at" in runs["resumed"][0].stderr
    assert "removed unfinished .tmp-000000064-of-the-dead" in runs["resumed"][0].stderr
    assert figures(runs["broken"]) == figures(runs["whole"])
    # Choices are counted in whole numbers, also those of a log window that was open when it was saved.
    assert (runs["broken"] / "routing.jsonl").read_text() == (runs["whole"] / "routing.jsonl").read_text()
    for kind in ("model", "ema", "ema_200"):
        one, other = (load_file(runs[name] / "ckpt" / f"{kind}.safetensors") for name in ("broken", "whole"))
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)
    assert loss_curve(runs["broken"]) == loss_curve(runs["whole"]), "TensorBoard shows every step once"
    assert (runs["broken"] / "DONE").exists()
    assert not (runs["broken"] / "FAILED").exists()


@pytest.mark.distributed
def test_another_layout_continues_the_same_curve(runs):
    assert_succeeded(runs["moved_run"])
    pairs = list(zip(figures(runs["moved"]), figures(runs["whole"]), strict=True))
    for one, other in pairs:
        assert (one["step"], one["images_seen"], one["lr"]) == (other["step"], other["images_seen"], other["lr"])
        # Design, invariance statement.
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def loss_curve(folder):
    """As TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars("loss")]


@pytest.mark.distributed
def test_state_says_what_a_person_asks(runs):
    store = Store(runs["whole"] / "ckpt")
    assert store.committed() == [64, 32], "none at the end: the run is DONE and its weights are exported"
    state = read_state(store.path(64))
    assert (state["steps"], state["images_seen"], state["optimizer_steps"], state["ranks"]) == (8, 64, 8, 2)
    assert state["plan"]["recipe"]["train"]["images"] == STEPS * BATCH
    assert len(state["previous_load"]) == 2
    assert sum(state["previous_load"][0]) == pytest.approx(1.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_set_a_flag_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
    assert signal.getsignal(number) == before
