"""Does a killed run lose anything? Kills a small CPU run with SIGKILL at random moments until it has been enough.

    python benchmarks/kill_and_resume.py --folder DIR [--kills 100] [--ranks 2] [--seed 0] [--write FILE.md]

Checkpoints are made every second step, so that many kills fall into the writing of one. After each kill every
committed checkpoint must be whole and none may have gone but by retention; a run that reaches its end must have the
rows and the weights of the unbroken one, bit by bit. Moments are drawn from (seed, number of the kill). Started
again with the same folder it goes on where it was. --write: also a report. Exit code 1 at the first loss.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file

from dsmoe.checkpoint.store import Store

ROOT = Path(__file__).resolve().parents[1]
BATCH, STEPS, KEEP = 8, 160, 3
SCIENCE = [
    "codec.name=none", "model.preset=nano-4E2A", "model.depth=2", "model.dim=32", "model.heads=2", "model.patch=4",
    "data.resolution=32", "data.size=32", f"train.global_batch={BATCH}", f"train.images={STEPS * BATCH}",
    "optimizer.warmup_images=16", "ema.half_life_images=200", "balance.scope=step", "report.samples=2",
    "report.sample_steps=2", "report.log_every=24", f"checkpoint.every={2 * BATCH}", f"checkpoint.keep={KEEP}",
]  # fmt: skip
FIGURES = ("step", "images_seen", "loss", "mse", "vb", "balance", "grad_norm", "lr")
ONE_RANK_SHARE, START_SHARE = 0.3, 0.15
START_SECONDS, TRAINING_SECONDS, PATIENCE = 8.0, 2.5, 120.0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, metavar="FILE.md")
    given = parser.parse_args(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    whole, broken = given.folder / "whole", given.folder / "broken"
    config = given.folder / "engine.json"
    config.write_text(json.dumps({"dsmoe": {"about": "killing"}, "zero_optimization": {"stage": 1}}))
    if not (whole / "DONE").exists() and start(config, whole, given.ranks).wait():
        print(f"the unbroken run failed; see {whole.with_suffix('.log')}", file=sys.stderr)
        return 1
    log = given.folder / "kills.jsonl"
    while sum(life["killed"] for life in lives(log)) < given.kills:
        number = len(lives(log))
        record = one_life(config, broken, given.ranks, random.Random(f"{given.seed} {number}"))
        if (broken / "DONE").exists():
            record["lost"] = record["lost"] or difference(whole, broken)
            record["ended"] = True
            shutil.rmtree(broken)
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"life": number, "commit": commit(), **record}) + "\n")
        print(number, record, flush=True)
        if record["lost"]:
            break
    records = lives(log)
    print(summary(records))
    if given.write:
        given.write.write_text(report(given, records), encoding="utf-8")
    return 1 if any(record["lost"] for record in records) else 0


def lives(log: Path) -> list[dict]:
    """The records so far: starts of the run, nearly all of which ended by a kill."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def summary(records: list[dict]) -> str:
    """The outcome in a line."""
    count = {name: sum(bool(r.get(name)) for r in records) for name in ("killed", "saving", "ended", "lost")}
    return (
        f"{count['killed']} kills, {count['saving']} of them while a checkpoint was being written; {count['ended']} "
        f"runs reached their end equal to the unbroken one; losses: {count['lost']}"
    )


def commit() -> str:
    """The checkout's commit, and whether what runs differs from it."""
    name, changed = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "dsmoe", "launchers"])
    )
    return name + ("-dirty" if changed else "")


def report(given: argparse.Namespace, records: list[dict]) -> str:
    """The results file: outcome, circumstances, and every life."""
    killed = [r for r in records if r["killed"]]
    facts = {
        "kills": len(killed),
        "of one rank alone, the others following": sum(r["one_rank"] for r in killed),
        "while a checkpoint was being written": sum(r["saving"] for r in killed),
        "before the first checkpoint of a run": sum(not r["committed"] for r in killed),
        "lives that reached the end before their kill came": len(records) - len(killed),
        "finished runs, rows and both weights equal to the unbroken run bit by bit": sum(
            bool(r.get("ended")) and not r["lost"] for r in records
        ),
        "committed checkpoints lost or damaged, or other faults": sum(bool(r["lost"]) for r in records),
    }
    rows = "\n".join(f"| {what} | {count} |" for what, count in facts.items())
    commits = ", ".join(sorted({r["commit"] for r in records}))
    return f"""# Kills and resumes, {date.today()}

`python benchmarks/kill_and_resume.py --folder DIR --kills {given.kills} --ranks {given.ranks} --seed {given.seed}`

{os.cpu_count()} CPU cores, {platform.machine()}, no GPU; Python {platform.python_version()}, torch {version("torch")},
DeepSpeed {version("deepspeed")}; dsmoe at commit {commits}. {given.ranks} ranks under torchrun, ZeRO-1, fp32, a MoE
of depth 2, {STEPS} steps of {BATCH} images, a checkpoint every second step, {KEEP} kept. Moments are drawn from (seed,
number of the life): {START_SHARE:.0%} within {START_SECONDS:g} s of the start, the rest within {TRAINING_SECONDS:g} s
of the first new row; {ONE_RANK_SHARE:.0%} hit one rank, the rest all processes. After each, every committed checkpoint
is read whole.

| what | count |
|---|---|
{rows}
"""


def start(config: Path, run: Path, ranks: int) -> subprocess.Popen:
    """The run under torchrun, one CPU thread a rank."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--"]
    command = [ROOT / "launchers/pretrain.py", "--deepspeed_config", config, "--run", run, *SCIENCE]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = str(ROOT)
    with open(run.with_suffix(".log"), "ab") as out:
        return subprocess.Popen([*launcher, *command], env=env, stdout=out, stderr=out, cwd=run.parent)


def one_life(config: Path, run: Path, ranks: int, chance: random.Random) -> dict:
    """Start the run, kill it at a moment drawn from `chance`, and look at what is left."""
    store = Store(run / "ckpt")
    before = store.committed()
    process = start(config, run, ranks)
    at_start, one_rank = chance.random() < START_SHARE, chance.random() < ONE_RANK_SHARE
    if not at_start:
        wait_for_training(process, run / "metrics.jsonl")
    time.sleep(chance.uniform(0, START_SECONDS if at_start else TRAINING_SECONDS))
    killed = process.poll() is None
    family = children(process.pid)
    committed = store.committed()  # what anybody could have relied on at this moment
    for pid in [chance.choice(family)] if one_rank and family else [process.pid, *family]:
        kill(pid)
    process.wait()
    for pid in family:
        kill(pid)
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        time.sleep(0.01)
    after = store.committed()
    record = {
        "killed": killed, "one_rank": one_rank, "before": before[:1], "committed": after[:1],
        "saving": any(not p.name.endswith("-deleted") for p in store.root.glob(".tmp-*")), "lost": "",
    }  # fmt: skip
    faults = [f"{n}: {fault}" for n in after if (fault := store.damage(n))]
    missing = [n for n in committed[:1] if n not in after and n < max(after, default=0) - KEEP * 2 * BATCH]
    missing += committed[:1] if not after else []
    if faults or missing or (before and after and after[0] < before[0]):
        record["lost"] = f"damaged {faults}, missing {missing}, {before} -> {committed} -> {after}"
    return record


def wait_for_training(process: subprocess.Popen, metrics: Path) -> None:
    """Until this life has written a row, or has ended."""
    size, deadline = metrics.stat().st_size if metrics.exists() else 0, time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        now = metrics.stat().st_size if metrics.exists() else 0
        if now > size:
            return
        size = now  # resuming cuts the file first
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """The rank processes of a torchrun."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill(pid: int) -> None:
    """SIGKILL, unless it is gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def difference(whole: Path, broken: Path) -> str:
    """What differs between the unbroken run and the other: rows, weights; "" when nothing does."""
    rows = [
        [[json.loads(line)[name] for name in FIGURES] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, broken)
    ]
    if rows[0] != rows[1]:
        return "rows differ"
    for kind in ("model", "ema"):
        one, other = (load_file(run / "ckpt" / f"{kind}.safetensors") for run in (whole, broken))
        if one.keys() != other.keys() or not all(one[name].equal(other[name]) for name in one):
            return f"{kind} weights differ"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
