"""What a run says of itself: console lines, metrics.jsonl, routing.jsonl, TensorBoard, the loss plot.

Where the routers sent the images is counted in routing_log.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmoe.base.plan import Plan
from dsmoe.base.run_folder import Lease, RunFolder
from dsmoe.runtime import distributed
from dsmoe.runtime.device import Device
from dsmoe.runtime.logging import get_logger
from dsmoe.training.health import check_finite
from dsmoe.training.routing_log import Routed, RoutingLog, Window

FIELDS = ("loss", "mse", "vb", "balance", "z_loss", "bad_gradient", "grad_norm", "data_seconds", "stop", "saved")
MEANS = ("loss", "mse", "vb", "balance", "z_loss", "grad_norm")


@dataclass
class StepReport:
    """Figures of one optimizer step on the device, gathered over ranks but not yet read by the host.

    figures: fp32 [ranks, len(FIELDS)]; routed: this rank's micro-batches, none for a dense model.
    ended: host clock at the end of the step.
    """

    step: int
    learning_rate: float
    ended: float
    figures: torch.Tensor
    routed: Sequence[Routed] = ()


def gather_report(step: int, learning_rate: float, figures: torch.Tensor, routed: Sequence[Routed] = ()) -> StepReport:
    """Exchange this rank's figures [len(FIELDS)] with the others: the only collective of ours in a step."""
    shared = torch.stack(distributed.all_gather_tensor(figures))
    return StepReport(step, learning_rate, time.perf_counter(), shared, routed)


class Telemetry:
    """Reads step reports one step late, so that a GPU never waits for the host, and writes at every interval."""

    def __init__(
        self,
        plan: Plan,
        lease: Lease | None,
        folder: Path,
        device: Device,
        dtype: torch.dtype,
        images_seen: int = 0,
        resumed: dict | None = None,
    ) -> None:
        """resumed: the `position` at images_seen to go on from; what an attempt that came further wrote is dropped."""
        resumed = resumed or {"bytes": 0, "elapsed": 0.0, "window": 0.0, "rows": []}
        routing = resumed.get("routing") or {"bytes": 0, "open": None}
        self._plan, self._lease, self._device = plan, lease, device
        self._folder = RunFolder(folder)
        self._pending: StepReport | None = None
        self._rows: list[dict[str, float | None]] = list(resumed["rows"])
        self._routing = None
        if plan.recipe.model.is_moe:
            self._routing = RoutingLog(plan, device.torch_device, routing["open"])
        self.heard: list[dict[str, float]] = []
        self._log_steps = max(1, round(plan.recipe.report.log_every / plan.recipe.train.global_batch))
        self._rate = device.matmul_rate(dtype)
        self._peak = device.peak_flops(dtype)
        now = time.perf_counter()
        self._started, self._since = now - resumed["elapsed"], now - resumed["window"]
        _cut(self._folder.metrics, resumed["bytes"])
        _cut(self._folder.routing, routing["bytes"])
        self._writer = _tensorboard(self._folder.tensorboard, images_seen)

    @property
    def elapsed(self) -> float:
        """Seconds since training began."""
        return time.perf_counter() - self._started

    def push(self, report: StepReport) -> None:
        """Take a step's report; reads, checks and maybe logs the one before it."""
        pending, self._pending = self._pending, report
        if pending is not None:
            self._read(pending)

    def settle(self) -> None:
        """Read the last report too: call before anything is saved."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._read(pending)

    def position(self) -> dict:
        """Where the figures stand, as plain data for `resumed`: all ranks call it, after `settle`; rank 0's counts."""
        now, routing = time.perf_counter(), None
        if self._routing is not None:
            routing = {"bytes": _size(self._folder.routing), "open": self._routing.position()}
        return {
            "bytes": _size(self._folder.metrics),
            "elapsed": now - self._started,
            "window": now - self._since,
            "rows": list(self._rows),
            "routing": routing,
        }

    def flush(self) -> None:
        """Read the last report and log what has not been logged yet."""
        self.settle()
        if self._rows:
            self._log(self._rows[-1])

    def close(self) -> None:
        """Write out and close the TensorBoard log."""
        if self._writer is not None:
            self._writer.close()

    def _read(self, report: StepReport) -> None:
        ranks = self.heard = [dict(zip(FIELDS, row, strict=True)) for row in report.figures.tolist()]
        row = {name: sum(r[name] for r in ranks) / len(ranks) for name in (*MEANS, "data_seconds")}
        check_finite(
            report.step + 1,
            [r["loss"] for r in ranks],
            [r["bad_gradient"] for r in ranks],
            row["grad_norm"],
            allow_overflow=self._plan.engine.precision == "fp16",
        )
        row.update(step=report.step + 1, lr=report.learning_rate, ended=report.ended)
        if not math.isfinite(row["grad_norm"]):  # only where loss scaling skipped the step: there is no norm
            row["grad_norm"] = None
        self._rows.append(row)
        for batch in report.routed:
            self._routing.add(batch)
        if row["step"] % self._log_steps == 0 or row["step"] == 1:
            self._log(row)

    def _log(self, last: dict[str, float | None]) -> None:
        recipe = self._plan.recipe
        now = last["ended"]
        seconds, steps = now - self._since, len(self._rows)
        figures = {name: _mean([r[name] for r in self._rows if r[name] is not None]) for name in MEANS}
        seen = last["step"] * recipe.train.global_batch
        rate = steps * recipe.train.global_batch / seconds
        flops = 6 * self._plan.model.macs * rate / self._plan.engine.world_size
        record = {
            "step": last["step"],
            "images_seen": seen,
            **figures,
            "lr": last["lr"],
            "images_per_second": rate,
            "data_share": sum(r["data_seconds"] for r in self._rows) / seconds,
            "matmul_fraction": flops / self._rate,
            "eta_seconds": (recipe.train.steps - last["step"]) * recipe.train.global_batch / rate,
            "elapsed_seconds": now - self._started,
            "memory_bytes": self._device.max_memory_bytes(),
        }
        if self._peak:
            record["mfu"] = flops / self._peak
        if self._plan.engine.precision == "fp16":
            record["skipped_steps"] = sum(r["grad_norm"] is None for r in self._rows)
        window = None
        if self._routing is not None:
            window = self._routing.take()
            record.update(window.summary())
        self._rows, self._since = [], now
        self._write(record, window, from_start=steps == last["step"])

    @distributed.on_main
    def _write(self, record: dict[str, object], window: Window | None, from_start: bool) -> None:
        if self._lease is not None:
            self._lease.verify()
        seen = record["images_seen"]
        _append(self._folder.metrics, json.dumps(record, allow_nan=False))
        for name, value in record.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, seen)
        get_logger("train").info("%s", console_line(record, self._plan.recipe.train.steps))
        if window is not None:
            maps = {"step": record["step"], "images_seen": seen, **window.maps()}
            _append(self._folder.routing, json.dumps(maps, separators=(",", ":")))
            window.show(self._writer, seen)
            if not from_start:  # a router's first steps say nothing of where it is going
                self._routing.watch(window.load, seen)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def console_line(record: dict[str, object], steps: int) -> str:
    """One progress line of a metrics record."""
    eta = int(record["eta_seconds"])
    parts = [
        f"step {record['step']}/{steps}",
        f"loss {record['loss']:.4f}",
        "grad none" if record["grad_norm"] is None else f"grad {record['grad_norm']:.3f}",
        f"lr {record['lr']:.2e}",
        f"{record['images_per_second']:.1f} images/s",
        f"matmul {record['matmul_fraction']:.0%}",
        f"data {record['data_share']:.1%}",
        f"ETA {eta // 3600}:{eta % 3600 // 60:02d}:{eta % 60:02d}",
    ]
    if "mfu" in record:
        parts.insert(6, f"MFU {record['mfu']:.1%}")
    if "load_entropy" in record:
        parts.insert(2, f"balance {record['balance']:.3f} (load entropy {record['load_entropy']:.3f})")
    if record.get("skipped_steps"):
        parts.append(f"skipped steps {record['skipped_steps']}")
    if record.get("dead_experts"):
        parts.append(f"dead experts {record['dead_experts']}")
    return "  ".join(parts)


@distributed.on_main
def _tensorboard(folder: Path, images_seen: int) -> object:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=images_seen + 1)


@distributed.on_main
def _cut(file: Path, size: int) -> None:
    """Drop the records that an earlier attempt wrote after the point from which this one goes on."""
    if _size(file) > size:
        os.truncate(file, size)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _append(file: Path, line: str) -> None:
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(line + "\n")


def read_metrics(path: Path) -> list[dict]:
    """All records of a metrics.jsonl, oldest first."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def draw_losses(records: list[dict], path: Path, title: str) -> None:
    """A PNG with the training loss (and the balance loss of a MoE model) against images seen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    is_moe = "load_entropy" in records[-1]
    figure = Figure(figsize=(9, 3.6) if is_moe else (5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    seen = [r["images_seen"] / 1000 for r in records]
    left, *right = figure.subplots(1, 2 if is_moe else 1, squeeze=False)[0]
    left.plot(seen, [r["mse"] for r in records], label="noise MSE")
    left.plot(seen, [r["loss"] for r in records], label="total", linewidth=0.8, alpha=0.7)
    left.set(xlabel="images seen (thousands)", ylabel="loss", yscale="log", title=title)
    left.grid(alpha=0.3, which="both")
    left.legend()
    for axes in right:
        axes.plot(seen, [r["load_entropy"] for r in records], color="tab:green")
        axes.set(xlabel="images seen (thousands)", ylabel="expert load entropy (1 = even)", title="routing")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
