"""Does a large model fit where it is sharded, and does any process ever hold all of it?

    python benchmarks/large_models.py --folder DIR [--models L/2-8E2A a6] [--depths 2 4 6] [--write FILE.md]

Two processes on a CPU, ZeRO-3 in bf16, parameters partitioned as they are made. At full depth: build, forward of one
image, export of a weight file, reading it back into another layout, the same forward again. Then whole training steps
(fp32 master, both moments, small buckets, recomputation) at each of --depths, whose peaks are fitted by a line and
extrapolated to the full depth. Peaks are resident memory of one process above that after its imports. Finished parts
are kept in the folder; started again it goes on.
"""

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import sys
import time
import zlib
from datetime import date
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
SIDE, CHANNELS, CLASSES = 32, 4, 1000
# Else glibc keeps freed blocks between the shards that stay, and they count as this process's memory.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 17),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 17),
}
CONFIG = {
    "train_batch_size": 2,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": 20_000_000,
        "stage3_prefetch_bucket_size": 20_000_000,
        "stage3_max_live_parameters": 40_000_000,
        "stage3_max_reuse_distance": 40_000_000,
        "sub_group_size": 100_000_000,
    },
    "steps_per_print": 10**9,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["L/2-8E2A", "a6"])
    parser.add_argument("--depths", nargs="+", type=int, default=[2, 4, 6], help="of the training steps")
    parser.add_argument("--write", type=Path, help="also write the report to this file")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.part:
        return run_part(json.loads(given.part), given.folder)
    given.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for model in given.models:
        made = part(given.folder, {"model": model, "what": "make", "expert_parallel": 1})
        sizes = (1, 2) if "E2A" in model else (1,)
        read = [part(given.folder, {"model": model, "what": "read", "expert_parallel": size}) for size in sizes]
        steps = [part(given.folder, {"model": model, "what": "train", "depth": depth}) for depth in given.depths]
        lines += report(made, read, steps)
    text = "\n".join(lines)
    print(text)
    if given.write:
        given.write.write_text(document(text), encoding="utf-8")
    return 0


def part(folder: Path, work: dict) -> dict:
    """What rank 0 found, now or at an earlier start; figures are the larger of the two processes'."""
    name = "-".join(str(v).replace("/", "_") for v in work.values())
    file = folder / f"{name}.json"
    if not file.exists():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--", __file__]
        command += ["--folder", str(folder), "--part", json.dumps({**work, "file": str(file)})]
        env = {**os.environ, **MALLOC, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, env={**env, "PYTHONPATH": str(ROOT)}, check=True)
        print(f"{name}: done", flush=True)
    return json.loads(file.read_text())


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def run_part(work: dict, folder: Path) -> int:
    from dsmoe.runtime import distributed
    from dsmoe.runtime.device import Device

    distributed.initialize(distributed.discover(os.environ), Device("cpu"))
    import deepspeed

    from dsmoe.training import engine  # noqa: F401 (imports belong to the base line)
    from dsmoe.training.deepspeed_patches import skip_shm_op

    skip_shm_op()
    deepspeed.init_distributed(dist_init_required=False)
    gc.collect()
    base = resident()
    found = {"make": make, "read": read, "train": train}[work["what"]](work, folder)
    peak = torch.tensor([resident("VmHWM") - base], dtype=torch.float64)
    found |= {**work, "peak": distributed.all_reduce_(peak, "max").item(), "base": base, "commit": commit()}
    if distributed.is_main():
        Path(work["file"]).write_text(json.dumps(found))
    distributed.shutdown()
    return 0


def build(name: str, expert_parallel: int = 1, depth: int | None = None) -> torch.nn.Module:
    """The model, partitioned as it is made."""
    import deepspeed

    from dsmoe.base.presets import preset
    from dsmoe.models.dit import DiT
    from dsmoe.training.engine import expert_layer

    torch.manual_seed(0)
    spec = preset(name, **({"depth": depth} if depth else {}))
    layer = expert_layer(expert_parallel)
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = DiT(spec, input_size=SIDE, in_channels=CHANNELS, num_classes=CLASSES, learn_sigma=True, moe_cls=layer)
    for fragment in partitions(model)[1]:
        if "adaLN" in fragment.name or fragment.name.startswith("final_layer"):
            # They start at zero, which would make the output zero, whatever lies below it.
            generator = torch.Generator().manual_seed(zlib.crc32(fragment.name.encode()))
            drawn = 0.02 * torch.randn(math.prod(fragment.shape), generator=generator)
            fragment.tensor.copy_(drawn[fragment.offset : fragment.offset + fragment.tensor.numel()])
    return model


def one_image() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, CHANNELS, SIDE, SIDE, generator=generator).bfloat16()
    return x, torch.tensor([500.0]), torch.tensor([7])


def forward(model: torch.nn.Module) -> list[float]:
    """The first outputs of one image, through DeepSpeed's engine without an optimizer."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=CONFIG, dist_init_required=False)
    with torch.no_grad():
        out, _ = engine(*one_image())
    return out.float().flatten()[::97].tolist()


def make(work: dict, folder: Path) -> dict:
    """Build, forward, export."""
    from dsmoe.checkpoint.stream import write_tensors
    from dsmoe.runtime import distributed
    from dsmoe.training.engine import gather

    started = time.monotonic()
    model = build(work["model"], work["expert_parallel"])
    built, largest = time.monotonic() - started, max(p.ds_numel for p in model.parameters())
    output = forward(model)
    shapes, fragments = partitions(model)
    tensors = gather(fragments, shapes)
    path = folder / (work["model"].replace("/", "_") + ".safetensors")
    if distributed.is_main():
        write_tensors(path, shapes, tensors, {})
    else:
        for _ in tensors:
            pass
    total = sum(p.ds_numel for p in model.parameters())
    return {"output": output, "built_seconds": built, "parameters": total, "largest": largest, "file_bytes": size(path)}


def partitions(model: torch.nn.Module) -> tuple[dict[str, tuple[int, ...]], list]:
    """Global shapes, and this rank's parts as they lie in the parameters (there is no optimizer to ask)."""
    from dsmoe.moe.experts import global_place
    from dsmoe.runtime import distributed
    from dsmoe.training.engine import Fragment

    shapes, fragments = {}, []
    for name, parameter in model.named_parameters():
        shapes[name], start = global_place(parameter, tuple(parameter.ds_shape))
        shard = parameter.ds_tensor.ds_numel
        offset = distributed.rank(parameter.ds_process_group) * shard
        own = min(shard, parameter.ds_numel - offset)
        if own > 0:
            fragments.append(Fragment(name, shapes[name], start + offset, parameter.ds_tensor.data.view(-1)[:own]))
    return shapes, fragments


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def read(work: dict, folder: Path) -> dict:
    """The exported file into a model of another layout, each rank its own part; the forward again."""
    model = build(work["model"], work["expert_parallel"])
    for parameter in model.parameters():
        parameter.ds_tensor.zero_()
    path = folder / (work["model"].replace("/", "_") + ".safetensors")
    with open(path, "rb") as file:
        size_of_header = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size_of_header))
        for fragment in partitions(model)[1]:
            # Read, not mapped: pages of a mapped file would count as this process's memory.
            file.seek(8 + size_of_header + header[fragment.name]["data_offsets"][0] + 4 * fragment.offset)
            values = np.fromfile(file, dtype="<f4", count=fragment.tensor.numel())
            fragment.tensor.copy_(torch.from_numpy(values))
    return {"output": forward(model)}


def train(work: dict, folder: Path) -> dict:
    """Two whole steps at a depth: backward, fp32 master and moments, publication."""
    from dsmoe.base.recipe import OptimizerSpec
    from dsmoe.training.engine import Engine
    from dsmoe.training.optimizer import build_optimizer

    model = build(work["model"], depth=work["depth"])
    model.activation_checkpointing = True
    total = sum(p.ds_numel for p in model.parameters())
    engine = Engine(model, build_optimizer(list(model.parameters()), OptimizerSpec(), "torch_fused"), CONFIG)
    losses = []
    for _ in range(2):
        out, _ = engine(*one_image())
        loss = out.float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return {"losses": losses, "parameters": total}


def commit() -> str:
    """The checkout's commit, marked when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def report(made: dict, read_back: list[dict], steps: list[dict]) -> list[str]:
    """What was found of one model, as markdown."""
    whole = 2 * made["parameters"]
    scale = max(abs(a) for a in made["output"])
    lines = [
        f"## {made['model']}: {made['parameters']:,} parameters, {gib(whole)} in bf16",
        "",
        f"Commits {', '.join(sorted({p['commit'] for p in (made, *read_back, *steps)}))}.",
        "",
        "| full depth | peak of a process |",
        "|---|---|",
        f"| built in {made['built_seconds']:.0f} s, forward, exported ({gib(made['file_bytes'])} fp32) | "
        f"{gib(made['peak'])} = {made['peak'] / whole:.0%} of the bf16 model |",
        *(
            f"| read back, expert-parallel {r['expert_parallel']}, forward again: largest difference "
            f"{difference(made, r):.2g} of outputs up to {scale:.2g} | {gib(r['peak'])} = {r['peak'] / whole:.0%} |"
            for r in read_back
        ),
        "",
        "| whole training steps at depth | parameters | peak of a process |",
        "|---|---|---|",
        *(f"| {s['depth']} | {s['parameters']:,} | {gib(s['peak'])} |" for s in steps),
    ]
    if len(steps) > 1:
        slope, start = line([s["depth"] for s in steps], [s["peak"] for s in steps])
        depth = full_depth(made["model"])
        lines.append(
            f"| {depth} (not run: the line through the above, {gib(start)} + {gib(slope)} a block) | "
            f"{made['parameters']:,} | {gib(start + slope * depth)} |"
        )
    return [*lines, ""]


def difference(one: dict, other: dict) -> float:
    """Largest difference of outputs."""
    return max(abs(a - b) for a, b in zip(one["output"], other["output"], strict=True))


def full_depth(name: str) -> int:
    from dsmoe.base.presets import preset

    return preset(name).depth


def line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope and intercept of the least-squares line."""
    mx, my = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
    return slope, my - slope * mx


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def document(text: str) -> str:
    """The report with what it was made of."""
    return f"""# Large models on two small processes

`python benchmarks/large_models.py --folder DIR` on {date.today()}, Python {platform.python_version()}, torch
{torch.__version__}, {os.cpu_count()} CPU cores, no GPU. {__doc__.split(chr(10), 4)[4].strip()}

{text}"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
