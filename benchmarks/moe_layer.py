"""One MoE layer, forward and backward: ours against what one would use instead, paired in one run.

    python benchmarks/moe_layer.py [--device cpu|cuda] [--dims 64 128 384] [--tokens 512 2048]
        [--dtypes float32 bfloat16] [--layers AutoEP ...] [--rounds 7] [--processes 3] [--threads 1] [--no-memory]
        [--write benchmarks/results/NAME]

Eight SwiGLU experts of hidden size 4D, two choices a token, a shared expert of 2D. Ours is dsmoe.moe.MoE as it trains,
with its balance losses and statistics, which the rivals do not compute. In a round every layer runs once, in an order
that turns from round to round; a ratio is rival / ours within one round, so above 1 ours is faster. The rounds of
several processes are taken together: where a process happens to have its memory moves a small layer's ratio by 5 %.
On a CPU time is the processor time of the process, which other programs on the machine disturb less than the clock on
the wall; on a GPU it is the wall's. Results are compared before anything is timed. Peak memory is of a process of its
own: the highest resident set during a second forward and backward, less that before it. So what the first left behind
(code, the libraries' packing buffers) does not count, nor do oneDNN's compiled products, whose cache is off; for every
layer alike.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from moe_rivals import RIVALS, agree  # noqa: E402

from dsmoe import ops  # noqa: E402
from dsmoe.base.presets import ModelSpec  # noqa: E402
from dsmoe.moe import MoE  # noqa: E402
from dsmoe.training.deepspeed_patches import skip_shm_op  # noqa: E402

OURS = "dsmoe"
# Ours with another implementation of moe_ffn than the default: rivals where --layers names them, on a CPU.
VARIANTS = ("native:library", "native:blocks")
EXPERTS = 8
# For the peak of any layer: freed blocks go back to the system at once, and oneDNN keeps none of the programs it
# compiles for a shape (about 1.5 MB each), so that the resident set is what the pass has in use.
QUIET = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    "LRU_CACHE_CAPACITY": "1",
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128, 384])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--layers", nargs="+", default=list(RIVALS), choices=(*RIVALS, *VARIANTS), help="the rivals")
    parser.add_argument("--rounds", type=int, default=7, help="in each process")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--write", type=Path, help="write NAME.json and NAME.md; cells of an existing one are kept")
    parser.add_argument("--peak", help="one memory cell as JSON: what a process of its own runs")
    parser.add_argument("--cell", help="the same of a cell's time")
    given = parser.parse_args(argv)
    if given.device != "cpu" and set(given.layers) & set(VARIANTS):
        parser.error(f"--layers {' '.join(VARIANTS)} are implementations for a CPU; leave them out with --device cuda.")
    torch.set_num_threads(given.threads)
    if given.peak:
        print("FOUND", json.dumps(peak(**json.loads(given.peak))))
        return 0
    if given.cell:
        single_process()
        print("FOUND", json.dumps(measure(json.loads(given.cell), given.layers, given.rounds)))
        return 0
    found = _load(given.write)
    for dtype in given.dtypes:
        for dim in given.dims:
            for tokens in given.tokens:
                key = {"device": given.device, "dtype": dtype, "dim": dim, "tokens": tokens, "threads": given.threads}
                cell = pooled(key, given.layers, given.rounds, given.processes)
                if not given.no_memory and given.device == "cpu":
                    cell["peak_mib"] = {n: _peak_of(key, n, given.processes) for n in (OURS, *given.layers)}
                found = [c for c in found if any(c[k] != v for k, v in key.items())] + [cell]
                print(_row(cell, given.layers), flush=True)
                _write(given.write, found)
    return 0


def our_layer(dim: int, dtype: str, device: str, kind: str = "swiglu") -> MoE:
    """Ours; kind "gelu" is the paper's upcycled layer, without a shared expert."""
    torch.manual_seed(0)
    shared = 2.0 if kind == "swiglu" else 0.0
    spec = ModelSpec(depth=1, dim=dim, heads=1, num_experts=EXPERTS, top_k=2, expert_kind=kind, shared_ratio=shared)
    return MoE(spec).to(device, getattr(torch, dtype))


def build(dim: int, dtype: str, device: str, names: list[str]) -> dict[str, torch.nn.Module]:
    """Ours and the rivals with its weights."""
    ours = our_layer(dim, dtype, device)
    return {OURS: ours} | {name: ours if name in VARIANTS else RIVALS[name](ours).to(device) for name in names}


def measure(key: dict, names: list[str], rounds: int) -> dict:
    """Seconds of every layer in every round."""
    layers = build(key["dim"], key["dtype"], key["device"], names)
    x, grad = inputs(key)
    truth = layers[OURS](x[None])[0][0].detach()
    agreed = {}
    for name in names:
        if name in VARIANTS:
            ops.prefer({"moe_ffn": name}, key["device"])
            agreed[name] = agree(layers[name](x[None])[0][0].detach(), truth)
        else:
            agreed[name] = agree(layers[name](x).detach(), truth) if layers[name].same_numbers else None
        assert agreed[name] is not False, f"{name} computes something else at {key}"
    for name in layers:
        step(layers[name], name, x, grad, key["device"])  # warm
    seconds = {name: [] for name in layers}
    order = list(layers)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            seconds[name].append(step(layers[name], name, x, grad, key["device"]))
    return {**key, "agreed": agreed, "seconds": seconds, "rounds": rounds}


def pooled(key: dict, names: list[str], rounds: int, processes: int) -> dict:
    """A cell measured in several processes, one after the other."""
    own = ["--cell", json.dumps(key), "--layers", *names, "--rounds", str(rounds)]
    parts = [_in_a_process(key, own, dict(os.environ)) for _ in range(processes)]
    seconds = {name: [s for part in parts for s in part["seconds"][name]] for name in parts[0]["seconds"]}
    return {**parts[0], "seconds": seconds, "rounds": rounds, "processes": processes, "commit": _commit()}


def step(layer: torch.nn.Module, name: str, x: torch.Tensor, grad: torch.Tensor, device: str) -> float:
    """Seconds of a forward and backward pass, gradients of input and parameters made anew."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    clock = time.process_time if device == "cpu" else time.perf_counter
    _wait(device)
    ours = name in (OURS, *VARIANTS)
    if ours:
        ops.prefer({} if name == OURS else {"moe_ffn": name}, device)
    start = clock()
    if ours:
        y, stats = layer(x[None])
        torch.autograd.backward((y, stats.balance_loss), (grad[None], torch.full_like(stats.balance_loss, 0.01)))
    else:
        layer(x).backward(grad)
    _wait(device)
    return clock() - start


def peak(dim: int, tokens: int, dtype: str, name: str, **_: object) -> float:
    """MiB by which the resident set rises above that before a second step."""
    if name == "DeepSpeed MoE":
        single_process()
    layers = build(dim, dtype, "cpu", [] if name == OURS else [name])
    x, grad = inputs({"dim": dim, "tokens": tokens, "dtype": dtype, "device": "cpu"})
    step(layers[name], name, x, grad, "cpu")
    layers[name].zero_grad(set_to_none=True)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else pages that the first step freed are there already and count for nothing
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident set
    before = _status("VmRSS")
    step(layers[name], name, x, grad, "cpu")
    return (_status("VmHWM") - before) / 1024


def _peak_of(key: dict, name: str, processes: int) -> float:
    """Median of several processes: where memory happens to lie moves a small layer's by a tenth."""
    own = ["--peak", json.dumps({**key, "name": name})]
    found = [_in_a_process(key, own, {**os.environ, **QUIET}) for _ in range(processes)]
    return round(statistics.median(found), 2)


def _in_a_process(key: dict, own: list[str], environment: dict[str, str]) -> Any:
    """What this script finds when started with these arguments."""
    command = [sys.executable, __file__, "--threads", str(key["threads"]), *own]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("FOUND "))[6:])


def _commit() -> str:
    """The checkout's commit, marked when files differ from it; what this script writes does not count."""
    name, changed = (
        subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        for command in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", ":!benchmarks/results"))
    )
    return name + ("-dirty" if changed else "")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def inputs(key: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N, D] and the upstream gradient of a cell."""
    generator = torch.Generator().manual_seed(1)
    shape = (key["tokens"], key["dim"])
    made = (torch.randn(shape, generator=generator) for _ in range(2))
    return tuple(t.to(key["device"], getattr(torch, key["dtype"])) for t in made)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def single_process() -> None:
    """DeepSpeed's own layer asks for a process group."""
    import logging

    logging.disable(logging.INFO)
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
    import deepspeed

    skip_shm_op()  # its compilation, which one process does not need
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("gloo", dist_init_required=False)


def ratios(cell: dict, name: str) -> tuple[float, float, float]:
    """Quartiles of rival / ours over the rounds: first, median, third."""
    pairs = zip(cell["seconds"][name], cell["seconds"][OURS], strict=True)
    low, middle, high = statistics.quantiles([theirs / ours for theirs, ours in pairs], n=4)
    return low, middle, high


def best_rival(cell: dict) -> str:
    """The rival with the smallest median ratio."""
    return min((n for n in cell["seconds"] if n != OURS), key=lambda n: ratios(cell, n)[1])


def _row(cell: dict, columns: list[str]) -> str:
    parts = [
        f"{cell['dtype']} | {cell['dim']} | {cell['tokens']} | {statistics.median(cell['seconds'][OURS]) * 1e3:.2f}"
    ]
    for name in columns:
        if name not in cell["seconds"]:
            parts.append("-")
            continue
        low, middle, high = ratios(cell, name)
        mark = "**" if name == best_rival(cell) else ""
        parts.append(f"{mark}{middle:.2f}{mark} ({low:.2f}-{high:.2f})")
    memory = cell.get("peak_mib", {})
    parts.append(" / ".join(f"{memory[n]:.3g}" if n in memory else "-" for n in (OURS, *columns)))
    parts.append(f"{cell['rounds']} x {cell['processes']} | {cell['commit']}")
    return "| " + " | ".join(parts) + " |"


def _write(name: Path | None, cells: list[dict]) -> None:
    if name is None:
        return
    name.with_suffix(".json").write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    cells = sorted(cells, key=lambda c: (c["device"], c["dtype"] != "float32", c["dim"], c["tokens"]))
    columns = [n for n in (*RIVALS, *VARIANTS) if any(n in cell["seconds"] for cell in cells)]
    table = [
        f"# One MoE layer, forward and backward ({date.today()})",
        "",
        f"`python benchmarks/moe_layer.py`, {platform.processor() or platform.machine()} ({_cpu()}), torch "
        f"{torch.__version__}, threads {sorted({c['threads'] for c in cells})}. Compiled operations: {ops.kernels()}.",
        "Ratios are rival / ours within a round: median (quartiles); above 1 ours is faster; bold: the best rival.",
        f"Memory: peak of a second pass in MiB, in the order {', '.join((OURS, *columns))}.",
        "",
        "| dtype | D | tokens | ours, ms | " + " | ".join(columns) + " | peak MiB | rounds x processes | commit |",
        "|---" * (len(columns) + 7) + "|",
        *(_row(cell, columns) for cell in cells),
    ]
    name.with_suffix(".md").write_text("\n".join(table) + "\n", encoding="utf-8")


def _load(name: Path | None) -> list[dict]:
    if name is None or not name.with_suffix(".json").exists():
        return []
    return json.loads(name.with_suffix(".json").read_text(encoding="utf-8"))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
