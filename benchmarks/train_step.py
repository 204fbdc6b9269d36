"""What does the system cost beside a bare torch loop? Time and memory of a training step, import and start-up time.

    python benchmarks/train_step.py [--models nano-8E2A@64 a1@256] [--batches 16 64] [--worlds 1 2] [--stages 0 1 2 3]
        [--precision fp32] [--turns N] [--block N] [--memory] [--starts] [--results DIR]
        [--write benchmarks/results/NAME]

A model is a preset at a picture size: nano-8E2A@64 is the quick start's, 16 tokens an image, so that parameters cost as
much as arithmetic; a1@256 is the paper's smallest as it is trained, 256 tokens an image.

Ours is the launcher's own run of the quick start with everything on: DeepSpeed engine, EMA, clipping, gradient watch,
metrics.jsonl and TensorBoard (a record every 5 steps), checkpoint figures. The bare loop has the same model, data by
index, loss, fused AdamW, clipping and EMA, and no more; on several ranks it is in DistributedDataParallel. Both live in
one process and take turns in the order ours, bare, bare, ours, so that a drifting machine hits both alike. Every cell
is a start of its own and is kept: started again, the script goes on, and it reports all that is kept. It uses a GPU
where there is one.
"""

import argparse
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
CODEC_IMAGES = 64
STARTS = 5
STEP_ONE = re.compile(r"\bstep 1/")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nano-8E2A@64", "a1@256"], help="PRESET@PIXELS to time")
    parser.add_argument("--batches", nargs="+", type=int, default=[16], help="images a step")
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2], help="processes")
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3], help="ZeRO stages")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 leaves stage 0 out")
    parser.add_argument("--turns", type=int, default=20, help="turns of each side in a cell; 0 times nothing")
    parser.add_argument("--block", type=int, default=5, help="steps in a turn; ours logs one record in each")
    parser.add_argument("--memory", nargs="*", metavar="MODEL", help="peak memory by stage (default S/2@64, batch 16)")
    parser.add_argument("--starts", action="store_true", help="time imports and starts of the launcher")
    parser.add_argument("--results", type=Path, default=ROOT / ".test-full/train_step", help="where cells are kept")
    parser.add_argument("--write", type=Path, help="also write NAME.json and NAME.md")
    parser.add_argument("--cell", help="one cell as JSON: what every rank of a start runs")
    given = parser.parse_args(argv)
    if given.cell:
        return run_cell(json.loads(given.cell))
    given.results.mkdir(parents=True, exist_ok=True)
    stages = [s for s in given.stages if s or given.precision == "fp32"]
    shared = {"precision": given.precision, "turns": given.turns, "block": given.block}
    timed = itertools.product(given.worlds, given.models, given.batches, stages) if given.turns else ()
    for world, model, batch, stage in timed:
        keep(given.results, {"world": world, "model": model, "batch": batch, "stage": stage, **shared})
    models = [] if given.memory is None else given.memory or ["S/2@64"]
    for world, model, stage in itertools.product(given.worlds, models, stages):
        keep(given.results, {"world": world, "model": model, "batch": 16, "stage": stage, **shared, "turns": 0})
    starts = start_times(given.results, measure=given.starts)
    cells = [json.loads(file.read_text()) for file in given.results.glob("cell-*.json")]
    cells.sort(key=lambda c: (c["world"], c["model"], c["batch"], c["stage"]))
    timed, memory = [c for c in cells if c["turns"]], [c for c in cells if not c["turns"]]
    if not timed:
        return 0
    text = report(timed, memory, starts)
    print(text)
    if given.write:
        found = {"about": circumstances(timed), "timed": timed, "memory": memory, "starts": starts}
        given.write.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        given.write.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return 0


def keep(results: Path, cell: dict) -> None:
    """Measure a cell, unless an earlier start of the script has."""
    name = "-".join(str(value).replace("/", "_") for value in cell.values())
    file = results / f"cell-{name}.json"
    if not file.exists():
        found = {**cell, **launch_cell(cell), "commit": commit(), "load": os.getloadavg()[0]}
        partial = file.with_suffix(".tmp")
        partial.write_text(json.dumps(found))
        os.replace(partial, file)
        print(f"{name}: done", flush=True)


def launch_cell(cell: dict) -> dict:
    """Run a cell in its own process or processes; rank 0's figures."""
    launcher = [sys.executable]
    if cell["world"] > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cell['world']}", "--"]
    command = [*launcher, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line[5:] for line in done.stdout.splitlines() if line.startswith("CELL ")]
    if not lines:
        sys.exit(f"{cell} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1])


def environment() -> dict[str, str]:
    """One thread a process unless the caller says otherwise: two ranks on two cores must not fight."""
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}


def run_cell(cell: dict) -> int:
    """Let the launcher build its run, and put our turns in the place of its loop."""
    from dsmoe.runtime import distributed
    from dsmoe.training import pretrain
    from dsmoe.training.checkpoints import Stopped

    def instead_of_train(run: object) -> None:
        figures = take_turns(run, cell)
        if distributed.is_main():
            print("CELL " + json.dumps(figures), flush=True)
        raise Stopped

    pretrain.train = instead_of_train
    with tempfile.TemporaryDirectory() as folder:
        code = pretrain.main(command_line(cell, Path(folder)), __doc__)
    return 0 if code == pretrain.EXIT_STOPPED else 1


def command_line(cell: dict, folder: Path) -> list[str]:
    """The launcher's arguments: the quick start at this model and batch, long enough for all turns."""
    config = folder / "engine.json"
    content = json.loads((ROOT / "ds_configs/quickstart.json").read_text(encoding="utf-8"))
    content["zero_optimization"]["stage"] = cell["stage"]
    if cell["precision"] == "bf16":
        content["bf16"] = {"enabled": True}
    config.write_text(json.dumps(content))
    preset, _, pixels = cell["model"].partition("@")
    batch, block = cell["batch"], cell["block"]
    return [
        "--deepspeed_config", str(config), "--run", str(folder / "run"), f"model.preset={preset}",
        f"data.resolution={pixels}", f"data.size={CODEC_IMAGES}", f"train.global_batch={batch}",
        f"train.images={(cell['turns'] + 2) * block * batch}",
        f"report.log_every={block * batch}", "report.sample_every=0", "checkpoint.every=0",
        "optimizer.warmup_images=16", "ema={decay: 0.9999}",
    ]  # fmt: skip


def take_turns(run: object, cell: dict) -> dict:
    """Time both sides, turn by turn, over the same batches; with no turns, ours alone for its memory."""
    from dsmoe.runtime import distributed
    from dsmoe.runtime.device import Device
    from dsmoe.training.loop import advance

    device = Device(run.device.type, run.device.index or 0)
    steps = {"ours": itertools.count(), "bare": itertools.count()}
    ours, data = itertools.tee(run.batches) if cell["turns"] else (run.batches, None)
    run.batches = ours
    bare = BareLoop(run) if cell["turns"] else None
    sides = {"ours": lambda n: advance(run, n), "bare": lambda n: bare.advance(n, next(data))}

    def turn(side: str) -> tuple[float, float]:
        device.synchronize()
        begun, cpu = time.perf_counter(), time.process_time()
        for _ in range(cell["block"]):
            sides[side](next(steps[side]))
        device.synchronize()
        return (time.perf_counter() - begun) / cell["block"], (time.process_time() - cpu) / cell["block"]

    for side in ("ours", "bare") if bare else ("ours",):  # the first steps allocate
        turn(side)
    seconds, cpu_seconds = {"ours": [], "bare": []}, {"ours": [], "bare": []}
    for number in range(cell["turns"]):
        for side in ("ours", "bare") if number % 2 == 0 else ("bare", "ours"):
            for kind, value in zip((seconds, cpu_seconds), turn(side), strict=True):
                kind[side].append(value)
    if bare is None:
        turn("ours")
    run.telemetry.settle()
    peak = distributed.all_reduce_(torch.tensor(float(device.max_memory_bytes()), dtype=torch.float64), "max")
    found = {"peak_bytes": int(peak), "planned_bytes": sum(run.plan.memory.values()), "device": device.name}
    found["tokens"] = run.engine.model.tokens
    if bare is not None:
        mine = sum(rank["loss"] for rank in run.telemetry.heard) / len(run.telemetry.heard)
        found |= {"seconds": seconds, "cpu_seconds": cpu_seconds, "last_loss": {"ours": mine, "bare": bare.last_loss()}}
    return found


class BareLoop:
    """The same training in plain torch, as one would write it by hand."""

    def __init__(self, run: object) -> None:
        from dsmoe.checkpoint.weights import new_model

        recipe = run.plan.recipe
        self._run, self._recipe, self._dtype = run, recipe, run.engine.dtype
        torch.manual_seed(recipe.train.seed)
        self._model = self._net = new_model(run.plan).to(run.device, self._dtype)
        if run.plan.engine.world_size > 1:
            self._net = torch.nn.parallel.DistributedDataParallel(self._model)
        self._stored = list(self._model.parameters())
        low = self._dtype != torch.float32
        self._masters = [p.detach().float() for p in self._stored] if low else self._stored
        spec = recipe.optimizer
        self._optimizer = torch.optim.AdamW(
            self._masters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True
        )
        self._decay = recipe.ema_decays["ema"]
        self._average = [p.detach().clone() for p in self._masters]

    def advance(self, step: int, batch: object) -> None:
        """One step over this rank's batch."""
        run, recipe = self._run, self._recipe
        batch = batch.to(run.device)
        inputs = run.task.training_inputs(batch.posterior, batch.labels, batch.index)
        x_t = run.objective.corrupt(inputs.x0, inputs.t, inputs.noise)
        output, stats = self._net(x_t.to(self._dtype), run.objective.model_time(inputs.t), inputs.y)
        loss = run.objective.training_loss(output, inputs.x0, x_t, inputs.t, inputs.noise).total.mean()
        if stats is not None:
            loss = loss + recipe.balance.coefficient * stats.balance_loss
        loss.backward()
        self._update(step)
        self._loss = loss.detach()

    def _update(self, step: int) -> None:
        from dsmoe.training.optimizer import learning_rate

        if self._masters is not self._stored:
            for master, stored in zip(self._masters, self._stored, strict=True):
                master.grad = stored.grad.float()
        recipe = self._recipe
        torch.nn.utils.clip_grad_norm_(self._masters, recipe.optimizer.clip)
        rate = learning_rate(recipe.optimizer, step * recipe.train.global_batch, recipe.train.images)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        with torch.no_grad():
            if self._masters is not self._stored:
                torch._foreach_copy_(self._stored, self._masters)
            torch._foreach_lerp_(self._average, self._masters, 1.0 - self._decay)
        self._net.zero_grad()
        self._optimizer.zero_grad()

    def last_loss(self) -> float:
        """Of the global batch."""
        from dsmoe.runtime import distributed

        return distributed.all_reduce_(self._loss, "mean").item()


def start_times(results: Path, measure: bool) -> dict[str, list[float]]:
    """Seconds from the start of a process: imports, and the launcher until it reports its first step. Kept as cells."""
    pretrain = [str(ROOT / "launchers/pretrain.py"), "--deepspeed_config", str(ROOT / "ds_configs/quickstart.json")]
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    measures = {
        "import torch": lambda: import_seconds("import torch"),
        "import dsmoe.training.pretrain": lambda: import_seconds("import dsmoe.training.pretrain"),
        "the same and deepspeed": lambda: import_seconds("import dsmoe.training.pretrain, deepspeed"),
        "python launcher, 1 rank, until step 1": lambda: first_step([sys.executable, *pretrain]),
        "deepspeed launcher, 2 ranks, until step 1": lambda: first_step([*deepspeed, *pretrain]),
    }
    found = {}
    for number, (name, seconds) in enumerate(measures.items()):
        file = results / f"start-{number}.json"
        if measure and not file.exists():
            file.write_text(json.dumps([seconds() for _ in range(STARTS)]))
        if file.exists():
            found[name] = json.loads(file.read_text())
    return found


def import_seconds(code: str) -> float:
    """A whole interpreter that imports and ends."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - begun


def import_memory() -> int:
    """Peak resident bytes of a process that only imports."""
    code = "import dsmoe.training.pretrain, deepspeed; from dsmoe.runtime.device import Device"
    code += "; print('BYTES', Device('cpu').max_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    return int(done.stdout.split("BYTES")[1])


def first_step(launcher: list[str]) -> float:
    """The quick start with few images to encode, until its first progress line; it is then asked to stop."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, "--run", f"{folder}/run", f"data.size={CODEC_IMAGES}", "train.images=12800"]
        begun = time.perf_counter()
        # A session of its own: deepspeed's launcher, told to stop, would leave its ranks running.
        with subprocess.Popen(
            command, env=environment(), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            seconds = next((time.perf_counter() - begun for line in process.stdout if STEP_ONE.search(line)), None)
            os.killpg(process.pid, signal.SIGTERM)
            rest = process.stdout.read()
        if seconds is None:
            sys.exit(f"{command} reached no step:\n{rest[-2000:]}")
    return seconds


def ratios(cell: dict, kind: str) -> list[float]:
    """Ours over bare, turn by turn. kind: seconds, or cpu_seconds of the process."""
    seconds = cell[kind]
    return [a / b for a, b in zip(seconds["ours"], seconds["bare"], strict=True)]


def spread(values: list[float], scale: float, digits: int) -> str:
    """Median and the quartiles."""
    low, middle, high = (q * scale for q in statistics.quantiles(values, n=4))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def report(timed: list[dict], memory: list[dict], starts: dict) -> str:
    """Markdown: circumstances, the paired table, memory, starts."""
    lines = [f"# A training step against bare torch, {date.today()}", "", circumstances(timed), ""]
    lines += [
        "| processes | model | tokens an image | batch | ZeRO | ours, ms a step | bare, ms a step | ours / bare "
        "| the same in CPU time |",
        "|" + "---|" * 9,
    ]
    for cell in timed:
        columns = [spread(cell["seconds"][side], 1000, 1) for side in ("ours", "bare")]
        columns += [spread(ratios(cell, kind), 1, 3) for kind in ("seconds", "cpu_seconds")]
        what = [cell[name] for name in ("world", "model", "tokens", "batch", "stage")]
        lines.append(f"| {' | '.join(map(str, what))} | {' | '.join(columns)} |")
    lines += [
        "",
        "| processes | model | ZeRO | peak memory of a process, MiB | by the plan's arithmetic, without libraries |",
        "|---|---|---|---|---|",
    ]
    for cell in memory:
        figures = f"{cell['peak_bytes'] / 2**20:.0f} | {cell['planned_bytes'] / 2**20:.0f}"
        lines.append(f"| {cell['world']} | {cell['model']} | {cell['stage']} | {figures} |")
    lines += ["", f"The imports alone take {import_memory() / 2**20:.0f} MiB of it."]
    lines += ["", "| start of a process | seconds |", "|---|---|"]
    lines += [f"| {name} | {spread(seconds, 1, 1)} |" for name, seconds in starts.items()]
    return "\n".join(lines)


def circumstances(timed: list[dict]) -> str:
    """What the figures were made with."""
    import deepspeed

    loads, turns, blocks = ([cell[name] for cell in timed] for name in ("load", "turns", "block"))
    differences = [abs(cell["last_loss"]["ours"] / cell["last_loss"]["bare"] - 1) for cell in timed]
    return (
        f"{timed[0]['device']}, {os.cpu_count()} cores, {timed[0]['precision']}, {environment()['OMP_NUM_THREADS']} "
        f"thread a process. Python {platform.python_version()}, torch {torch.__version__}, DeepSpeed "
        f"{deepspeed.__version__}, commit {', '.join(sorted({cell['commit'] for cell in timed}))}; load average "
        f"after the cells {min(loads):.1f} to {max(loads):.1f}. Median and quartiles of "
        f"{min(turns)} to {max(turns)} turns of {min(blocks)} to {max(blocks)} steps a side, in the order ours, bare, "
        "bare, ours; ours / bare is taken turn by turn. CPU time is rank 0's, all its threads: on a machine with other "
        "jobs it says what a step costs, where seconds say who else was at work. "
        f"Both sides trained the same: their last losses differ by at most {max(differences):.1e}. "
        "Engine policy: `ds_configs/quickstart.json` at the stage stated."
    )


def commit() -> str:
    """The checkout's commit, marked when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
