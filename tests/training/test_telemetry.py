"""What a run says of itself, computed by hand from made step reports: rates, routing figures, rows, lines."""

import json
import logging

import numpy as np
import pytest
import torch
from made_plan import made_plan, made_recipe

from dsmoe.base.errors import TrainingFailure
from dsmoe.base.run_folder import RunFolder
from dsmoe.training import telemetry as module
from dsmoe.training.routing_log import Routed
from dsmoe.training.telemetry import (
    FIELDS,
    MEANS,
    StepReport,
    Telemetry,
    console_line,
    draw_losses,
    gather_report,
    read_metrics,
)

# made_plan: 8 images a step, 20 steps, 2 ranks, 5e6 MACs an image; logged at step 1 and every 4 steps.
BATCH, STEPS, WORLD, MACS = 8, 20, 2, 5_000_000
CHOICES = 16 * 16 * 2  # 32 px in patches of 2, two experts a token
RATE, PEAK = 1e9, 4e9


class FakeDevice:
    """A device with round numbers."""

    torch_device = torch.device("cpu")

    def __init__(self, peak=None):
        self.peak = peak

    def matmul_rate(self, dtype):
        return RATE

    def peak_flops(self, dtype):
        return self.peak

    def max_memory_bytes(self):
        return 12345


class Clock:
    """Stands in for the time module of telemetry."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def make(tmp_path, clock):
    """Telemetry on a fresh run folder."""

    def build(plan=None, peak=None, **position):
        folder = RunFolder(tmp_path / "run")
        plan = plan or made_plan()
        return Telemetry(plan, folder.create(plan), folder.path, FakeDevice(peak), torch.float32, **position)

    return build


def routed(load):
    """One image of every layer's load [L, E], in whole choices."""
    load = torch.as_tensor(load, dtype=torch.float32)
    return [Routed(load, load[None], torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))]


def report(step, ended, ranks=WORLD, load=None, **figures):
    """Figures of one step; a list gives one value a rank. load [L, E] of the routers, even when left out."""
    values = dict.fromkeys(FIELDS, 0.0) | dict.fromkeys(MEANS, 0.5) | figures
    columns = [v if isinstance(v, list) else [v] * ranks for v in (values[name] for name in FIELDS)]
    return StepReport(
        step, 1e-4 * (step + 1), ended, torch.tensor(columns).T.contiguous(), routed(EVEN if load is None else load)
    )


EVEN = [[0.25] * 4] * 2


def rows(telemetry_folder):
    return read_metrics(telemetry_folder / "run" / "metrics.jsonl")


def test_reports_are_read_one_step_late_and_all_of_them(make, tmp_path):
    telemetry = make()
    file = tmp_path / "run" / "metrics.jsonl"
    losses = [float(n * n) for n in range(10)]
    for step, loss in enumerate(losses):
        telemetry.push(report(step, 1000.0 + step + 1, loss=loss))
        # Step s + 1 is on record only once the report after it has come.
        assert file.exists() == (step >= 1)
    assert [r["step"] for r in rows(tmp_path)] == [1, 4, 8]
    telemetry.flush()
    got = rows(tmp_path)
    assert [r["step"] for r in got] == [1, 4, 8, 10]
    # Every step's loss is in exactly one row's mean.
    assert [r["loss"] for r in got] == pytest.approx([losses[0], *map(np.mean, (losses[1:4], losses[4:8], losses[8:]))])
    telemetry.flush()
    assert len(rows(tmp_path)) == 4, "nothing new, nothing written"


def test_rates_follow_from_the_recorded_step_times(make, tmp_path, clock):
    telemetry = make(peak=PEAK)
    ended = [1002.0, 1002.5, 1003.0, 1004.0, 1004.25]
    clock.now = 5000.0  # the host runs ahead or behind; only the times in the reports count
    for step, time in enumerate(ended):
        telemetry.push(report(step, time, data_seconds=[0.1, 0.3]))
    telemetry.flush()
    first, second, last = rows(tmp_path)
    assert first["images_per_second"] == pytest.approx(BATCH / 2.0)
    assert second["images_per_second"] == pytest.approx(3 * BATCH / 2.0)
    assert last["images_per_second"] == pytest.approx(BATCH / 0.25)
    # Waiting for data: mean over ranks, summed over the steps of the row, as a share of its time.
    assert second["data_share"] == pytest.approx(3 * 0.2 / 2.0)
    assert second["eta_seconds"] == pytest.approx((STEPS - 4) * 2.0 / 3)
    assert [r["elapsed_seconds"] for r in (first, second, last)] == pytest.approx([2.0, 4.0, 4.25])
    # Forward and backward are three passes of two operations a multiply-accumulate, shared by the ranks.
    flops = 3 * 2 * MACS * (3 * BATCH / 2.0) / WORLD
    assert second["matmul_fraction"] == pytest.approx(flops / RATE)
    assert second["mfu"] == pytest.approx(flops / PEAK)


def test_rows_hold_means_over_ranks_and_steps_and_the_last_rate(make, tmp_path):
    telemetry = make()
    telemetry.push(report(0, 1001.0))
    for step in (1, 2, 3):
        telemetry.push(report(step, 1001.0 + step, mse=[float(step), 3.0 * step], vb=0.25, grad_norm=2.0))
    telemetry.flush()
    row = rows(tmp_path)[-1]
    assert (row["step"], row["images_seen"]) == (4, 4 * BATCH)
    assert row["mse"] == pytest.approx(np.mean([2.0, 4.0, 6.0]))
    assert (row["vb"], row["grad_norm"], row["loss"], row["memory_bytes"]) == (0.25, 2.0, 0.5, 12345)
    assert row["lr"] == pytest.approx(4e-4)
    assert "mfu" not in row


def test_a_dense_model_has_no_routing(make, tmp_path):
    dense = make(made_plan(made_recipe(model={"num_experts": 0, "shared_ratio": 0.0})))
    given = report(0, 1001.0)
    dense.push(StepReport(0, given.learning_rate, given.ended, given.figures))
    dense.flush()
    assert "load_entropy" not in rows(tmp_path)[0]
    assert not (tmp_path / "run" / "routing.jsonl").exists()
    assert dense.position()["routing"] is None


def made_loads(steps, seed=0):
    """Whole numbers of choices as shares [steps, 2, 4]; a little of every expert's load is somewhere."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(CHOICES, rng.dirichlet(np.full(4, 0.6), size=(steps, 2))) / CHOICES


def test_routing_figures_are_those_of_the_windows_steps(make, tmp_path):
    loads = made_loads(4)
    telemetry = make()
    for step, load in enumerate(loads):
        telemetry.push(report(step, 1001.0 + step, load=load))
    telemetry.flush()
    maps = read_metrics(tmp_path / "run" / "routing.jsonl")
    assert [(m["step"], m["images_seen"]) for m in maps] == [(r["step"], r["images_seen"]) for r in rows(tmp_path)]
    for row, drawn, window in zip(rows(tmp_path), maps, (loads[:1], loads[1:]), strict=True):
        mean = window.mean(0)
        np.testing.assert_allclose(drawn["load"], mean, atol=0.5e-6)
        logs = np.log(mean, out=np.zeros_like(mean), where=mean > 0)
        entropy = -(mean * logs).sum(1) / np.log(4)
        assert row["load_entropy"] == pytest.approx(entropy.mean(), abs=1e-12)
        assert row["layer_entropy"] == pytest.approx(entropy, abs=0.5e-6)
        assert row["load_max_over_mean"] == pytest.approx(mean.max() * 4, rel=1e-12)
        assert row["layer_max_over_mean"] == pytest.approx(mean.max(1) * 4, abs=0.5e-4)
        dead = [f"layer {layer} expert {expert}" for layer, expert in np.argwhere(mean < 0.05 / 4)]
        assert (row["dead"], row["dead_experts"]) == (dead, len(dead))


def test_an_open_window_goes_on_where_it_was_saved(make, tmp_path):
    """Stopped after step 3 and 6 of windows that end at 1, 4 and 8; what came after the save is dropped."""
    loads = made_loads(10, seed=1)

    def push(telemetry, steps):
        for step in steps:
            telemetry.push(report(step, 1001.0 + step, load=loads[step]))

    folder = tmp_path / "run"
    whole = make()
    push(whole, range(10))
    whole.flush()
    expected = [(folder / name).read_text() for name in ("metrics.jsonl", "routing.jsonl")]
    for name in ("metrics.jsonl", "routing.jsonl"):
        (folder / name).unlink()
    position = None
    for begin, saved, lost in ((0, 3, 5), (3, 6, 9)):
        telemetry = make(resumed=position)
        push(telemetry, range(begin, saved))
        telemetry.settle()
        position = json.loads(json.dumps(telemetry.position()))
        push(telemetry, range(saved, lost))
        telemetry.flush()
    last = make(resumed=position)
    push(last, range(6, 10))
    last.flush()
    got = [(folder / name).read_text() for name in ("metrics.jsonl", "routing.jsonl")]
    assert got[1] == expected[1]
    kept = [[{k: row[k] for k in row if k in ROUTING} for row in parse(text)] for text in (got[0], expected[0])]
    assert kept[0] == kept[1]


ROUTING = ("step", "loss", "load_entropy", "load_max_over_mean", "dead", "layer_entropy", "layer_max_over_mean")


def parse(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_position_of_before_there_was_a_routing_log_still_resumes(make, tmp_path):
    telemetry = make(resumed={"bytes": 0, "elapsed": 5.0, "window": 1.0, "rows": [], "load": None})
    telemetry.push(report(8, 1010.0))
    telemetry.flush()
    assert [r["step"] for r in rows(tmp_path)] == [9]


def test_an_expert_that_stays_dead_is_told_once_and_when_it_is_back(make, caplog):
    """Logged after steps 1, 4, 8, 12, 16, 20; the first interval does not count."""
    dead = [[0.25] * 4, [0.5, 0.0, 0.25, 0.25]]
    telemetry = make()
    with caplog.at_level(logging.INFO, logger="dsmoe.train"):
        for step in range(20):
            telemetry.push(report(step, 1001.0 + step, load=dead if step < 12 else EVEN))
        telemetry.flush()
    told = [(r.levelname, r.getMessage()) for r in caplog.records if "layer" in r.getMessage()]
    assert told == [
        ("WARNING", "DEAD at 64 images, below 5 % of a fair share for 2 log intervals: layer 1 expert 1 (0.0%)"),
        ("WARNING", "no longer dead at 128 images: layer 1 expert 1 (100.0%)"),
    ]
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("step")]
    assert [line.endswith("dead experts 1") for line in lines] == [True] * 4 + [False] * 2


def test_a_bad_figure_stops_before_its_row_and_names_rank_and_step(make, tmp_path):
    telemetry = make()
    telemetry.push(report(0, 1001.0))
    telemetry.push(report(1, 1002.0, loss=[0.5, float("nan")]))
    with pytest.raises(TrainingFailure, match=r"loss nan at step 2 on rank 1"):
        telemetry.push(report(2, 1003.0))
    assert [r["step"] for r in rows(tmp_path)] == [1]


def test_the_last_step_is_checked_too(make):
    telemetry = make()
    telemetry.push(report(0, 1001.0, bad_gradient=[1.0, 0.0]))
    with pytest.raises(TrainingFailure, match=r"gradient at step 1 on rank 0"):
        telemetry.flush()


def test_loss_scaling_overflow_is_no_failure_in_fp16(make):
    telemetry = make(made_plan(precision="fp16"))
    telemetry.push(report(0, 1001.0, bad_gradient=1.0))
    telemetry.flush()


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_steps_that_loss_scaling_skipped_leave_strict_json_and_are_counted(make, tmp_path, caplog, norm):
    """Logged after steps 1 and 4: the first window is one skipped step, of the second the third step is skipped."""

    def strict(line):
        def refuse(constant):
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(line, parse_constant=refuse)

    telemetry = make(made_plan(precision="fp16"))
    with caplog.at_level(logging.INFO, logger="dsmoe.train"):
        for step, measured in enumerate([norm, 2.0, norm, 4.0]):
            bad = float(measured == norm or measured != measured)
            telemetry.push(report(step, 1001.0 + step, grad_norm=measured, bad_gradient=bad))
        telemetry.settle()
    first, second = map(strict, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert (first["grad_norm"], first["skipped_steps"]) == (None, 1)
    assert (second["grad_norm"], second["skipped_steps"]) == (3.0, 1)
    assert second["loss"] == 0.5
    shown = [r.getMessage() for r in caplog.records if r.getMessage().startswith("step")]
    assert "grad none" in shown[0]
    assert all(line.endswith("skipped steps 1") for line in shown)


def test_a_skipped_step_in_an_open_window_is_strict_json_in_a_checkpoint(make):
    telemetry = make(made_plan(precision="fp16"))
    telemetry.push(report(1, 1001.0, grad_norm=float("inf")))
    telemetry.settle()
    assert json.loads(json.dumps(telemetry.position(), allow_nan=False))["rows"][0]["grad_norm"] is None


def test_a_run_that_was_taken_over_writes_no_more(make, tmp_path):
    telemetry = make()
    telemetry.push(report(0, 1001.0))
    RunFolder(tmp_path / "run").create(made_plan())
    with pytest.raises(TrainingFailure, match="later job"):
        telemetry.flush()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_figures_reach_tensorboard_by_images_seen(make, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    telemetry = make()
    for step in range(5):
        telemetry.push(report(step, 1001.0 + step, loss=float(step), load=torch.full((2, 4), 0.25)))
    telemetry.flush()
    telemetry.close()
    events = EventAccumulator(str(tmp_path / "run" / "tb"))
    events.Reload()
    names = ("loss", "load_entropy", "layer_entropy/01", "layer_max_over_mean/00")
    got = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}
    assert got["loss"] == [(8, 0.0), (32, 2.0), (40, 4.0)]
    for name in names[1:]:
        assert got[name] == [(8, 1.0), (32, 1.0), (40, 1.0)]
    assert [e.step for e in events.Images("load/layers_by_experts")] == [8, 32, 40]


def test_interval_shorter_than_a_batch_logs_every_step(make, tmp_path):
    telemetry = make(made_plan(made_recipe(report={"log_every": 1})))
    for step in range(3):
        telemetry.push(report(step, 1001.0 + step))
    telemetry.flush()
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3]


def test_gathering_alone_keeps_the_figures_and_the_time(clock):
    clock.now = 7.0
    figures = torch.arange(float(len(FIELDS)))
    sent = routed(EVEN)
    got = gather_report(3, 0.1, figures, sent)
    assert torch.equal(got.figures, figures[None])
    assert (got.step, got.learning_rate, got.ended, got.routed) == (3, 0.1, 7.0, sent)


ROW = {
    "step": 40, "images_seen": 320, "loss": 1.23456, "grad_norm": 0.5, "lr": 3e-5, "images_per_second": 12.34,
    "matmul_fraction": 0.417, "data_share": 0.0123, "eta_seconds": 3725.9,
}  # fmt: skip
ROUTED = {"load_entropy": 0.98765, "balance": 1.0123, "dead_experts": 0}


def test_console_line_holds_what_one_watches():
    line = console_line(ROW, 200)
    for part in (
        "step 40/200",
        "loss 1.2346",
        "grad 0.500",
        "lr 3.00e-05",
        "12.3 images/s",
        "matmul 42%",
        "ETA 1:02:05",
    ):
        assert part in line
    for absent in ("MFU", "balance", "dead"):
        assert absent not in line
    assert "balance 1.012 (load entropy 0.988)" in console_line({**ROW, **ROUTED}, 200)
    assert "MFU 31.2%" in console_line({**ROW, "mfu": 0.3123}, 200)
    assert console_line({**ROW, **ROUTED, "dead_experts": 9}, 200).endswith("dead experts 9")


def test_loss_plot_is_a_picture_for_dense_and_routed_runs(tmp_path):
    from PIL import Image

    dense = [{"images_seen": 8 * n, "loss": 1 / n, "mse": 0.9 / n} for n in range(1, 5)]
    sizes = []
    for records in (dense, [{**r, "load_entropy": 0.9} for r in dense]):
        draw_losses(records, tmp_path / "loss.png", "title")
        with Image.open(tmp_path / "loss.png") as image:
            sizes.append(image.size)
            assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    assert sizes[1][0] > sizes[0][0], "routing has a panel of its own"


def test_metrics_file_is_one_json_object_a_line(make, tmp_path):
    telemetry = make()
    telemetry.push(report(0, 1001.0))
    telemetry.flush()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    assert [json.loads(line) for line in text.splitlines()] == rows(tmp_path)
