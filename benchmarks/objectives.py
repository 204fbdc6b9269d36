"""Does every objective train the quick start's model, and does every sampler draw from what it learned?

    python benchmarks/objectives.py --folder DIR [--write benchmarks/results/FILE.md]

Trains through launchers/pretrain.py (plain python, one process): every prediction on every discrete schedule, rectified
flow with both time densities and multi-resolution noise for STEPS steps each, and two models for LONG steps, from which
each sampler draws a sheet (launchers/sample.py) and has its classes judged (benchmarks/class_agreement.py). Started
again with the same folder it goes on where it was. Exit code 1 when a loss did not fall.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
STEPS, LONG, BATCH, WINDOW = 120, 300, 64, 20
COMMON = [
    "data.size=1024", f"train.global_batch={BATCH}", f"optimizer.warmup_images={20 * BATCH}", "report.sample_every=0",
    f"report.log_every={BATCH}", "report.samples=16", "report.sample_steps=10", "checkpoint.every=0",
    "ema.half_life_images=640",
]  # fmt: skip
DISCRETE = {
    f"{prediction}, {schedule}": [f"diffusion.prediction={prediction}", f"diffusion.schedule={schedule}"]
    for prediction in ("epsilon", "v", "x0")
    for schedule in ("linear", "scaled_linear", "cosine")
}
FLOW = ["diffusion.prediction=velocity", "diffusion.schedule=rectified_flow"]
LOGIT = [*FLOW, "diffusion.time_density=logit_normal"]
NOISY = [*DISCRETE["epsilon, scaled_linear"], "diffusion.noise=multi_resolution"]
RUNS = {name: (STEPS, changes) for name, changes in DISCRETE.items()} | {
    "velocity, rectified flow, uniform": (STEPS, FLOW),
    "velocity, rectified flow, logit-normal": (STEPS, LOGIT),
    "epsilon, scaled_linear, multi-resolution noise": (STEPS, NOISY),
    "long epsilon, scaled_linear": (LONG, DISCRETE["epsilon, scaled_linear"]),
    "long velocity, rectified flow, logit-normal": (LONG, LOGIT),
}
DRAWS = {
    "DDIM trailing": ("long epsilon, scaled_linear", ["--sampler", "ddim"]),
    "DDIM trailing, guidance on 3 channels": ("long epsilon, scaled_linear", ["--cfg-channels", "3"]),
    "DDIM leading": ("long epsilon, scaled_linear", ["--spacing", "leading"]),
    "DDIM linspace": ("long epsilon, scaled_linear", ["--spacing", "linspace"]),
    "DDIM trailing, eta 1": ("long epsilon, scaled_linear", ["--eta", "1"]),
    "ancestral, respaced": ("long epsilon, scaled_linear", ["--sampler", "ancestral"]),
    "Euler": ("long velocity, rectified flow, logit-normal", []),
    "Euler, guidance on 3 channels": ("long velocity, rectified flow, logit-normal", ["--cfg-channels", "3"]),
}
SAMPLES = ["--steps", "50", "--guidance", "2.5"]
JUDGED = 64


def main(argv: list[str]) -> int:
    """Run what is missing, print the tables, say whether every loss fell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="runs, sheets and logs; what is there is not redone")
    parser.add_argument("--write", type=Path, help="also write the tables, with their circumstances, to this file")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    losses = [trained(options, name) for name in RUNS]
    draws = [drawn(options, name) for name in DRAWS]
    text = tables(losses, draws)
    print(text)
    if options.write:
        options.write.write_text(document(text), encoding="utf-8")
    risen = [row["name"] for row in losses if row["last"] >= row["first"]]
    print(f"{len(losses)} objectives, losses that did not fall: {', '.join(risen) or 'none'}")
    return 1 if risen else 0


def trained(options: argparse.Namespace, name: str) -> dict:
    """First and last mean squared error of a run, made now unless an earlier start has finished it."""
    steps, changes = RUNS[name]
    run = run_folder(options.folder, name)
    if not (run / "DONE").exists():
        engine = ["--deepspeed_config", "ds_configs/quickstart.json", "--run", run]
        execute(options, ["launchers/pretrain.py", *engine, *COMMON, *changes, f"train.images={steps * BATCH}"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == steps, (name, len(rows))
    first, last = (sum(r["mse"] for r in part) / WINDOW for part in (rows[:WINDOW], rows[-WINDOW:]))
    bits = [sum(r["vb"] for r in part) / WINDOW for part in (rows[:WINDOW], rows[-WINDOW:])]
    return {"name": name, "steps": steps, "first": first, "last": last, "bits": bits}


def drawn(options: argparse.Namespace, name: str) -> dict:
    """The share of images that show their class; also leaves a sheet."""
    run, changes = DRAWS[name]
    stem = file_name(name)
    sheet, judged = options.folder / f"{stem}.png", options.folder / f"{stem}.json"
    how = ["--checkpoint", run_folder(options.folder, run), *SAMPLES, *changes]
    if not sheet.exists():
        execute(options, ["launchers/sample.py", *how, "--per-class", "1", "--out", sheet])
    if not judged.exists():
        counts = ["--samples", JUDGED, "--held-out", "64"]
        execute(options, ["benchmarks/class_agreement.py", *how, *counts, "--out", judged])
    report = json.loads(judged.read_text())
    return {"name": name, "run": run, "sampling": report["sampling"], **report["generated"]}


def run_folder(folder: Path, name: str) -> Path:
    """Where the run of this name lies."""
    return folder / file_name(name)


def file_name(name: str) -> str:
    """Letters, digits and dashes."""
    return "-".join("".join(c if c.isalnum() or c == "_" else " " for c in name).split()).lower()


def execute(options: argparse.Namespace, words: list) -> None:
    """One command in this interpreter on one CPU thread, its output in the folder's log; raises when it fails."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *map(str, words)]
    with open(options.folder / "commands.log", "a", encoding="utf-8") as log:
        print(" ".join(command[1:]), flush=True)
        log.write(f"$ {' '.join(command[1:])}\n")
        log.flush()
        subprocess.run(command, cwd=ROOT, env=environ, stdout=log, stderr=log, check=True)


def tables(losses: list[dict], draws: list[dict]) -> str:
    """Markdown."""
    lines = [
        f"| objective | steps | MSE of the first {WINDOW} | of the last {WINDOW} | ratio | variance bits, the same |",
        "|---|---|---|---|---|---|",
    ]
    for row in losses:
        bits = "none" if row["bits"] == [0, 0] else "{:.3g}, {:.3g}".format(*row["bits"])
        figures = f"{row['first']:.3f} | {row['last']:.3f} | {row['last'] / row['first']:.2f} | {bits}"
        lines.append(f"| {row['name']} | {row['steps']} | {figures} |")
    lines += ["", "| sampler | model | as drawn | class found | lower 95 % bound |", "|---|---|---|---|---|"]
    for row in draws:
        figures = f"{row['agreement']:.1%} | {row['lower_95']:.1%}"
        lines.append(f"| {row['name']} | {row['run']} | {row['sampling']} | {figures} |")
    return "\n".join(lines)


def document(text: str) -> str:
    """The tables with what they were made of."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"""# Objectives and samplers on the quick start's model, {date.today()}

`python benchmarks/objectives.py`, commit {commit}, Python {platform.python_version()}, torch {torch.__version__}, one
thread of {os.cpu_count()} ({cpus[0].split(":")[1].strip() if cpus else "unknown"}), no GPU. Model, codec and
optimizer of the quick start on 1024 scenes, {BATCH} images a step, one seed. The mean squared error is that of each
objective's own target, so rows compare with themselves alone: a network that answers 0 has about 1 (velocity: 2).
Class found: of {JUDGED} generated images, chance 6.25 %.

{text}
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
