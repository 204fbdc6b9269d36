"""How fast do training batches come from a latent cache, and how fast from images through the codec?

    python benchmarks/latent_cache.py --photos FOLDER --taesd FOLDER [--resolution 128] [--write FILE.md]

Builds the cache with launchers/cache_latents.py (one process), then takes turns in this one: micro-batches of latents
from images (decode, crop, mirror, encode: the path of codec.cache=none), then the same ones from the cache, TURNS
times. What is timed begins with the loader, so that nothing is read ahead, and ends with the posterior in memory. Exit
code 1 when the two differ by a bit or the cache is not faster.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from dsmoe.base.recipe import Recipe, load_recipe
from dsmoe.codec import build as build_codec
from dsmoe.codec.protocol import Codec, Posterior
from dsmoe.data.latent_cache import LatentCache
from dsmoe.data.loader import Batch, BatchLoader
from dsmoe.data.order import BatchLayout, SampleOrder
from dsmoe.preprocess.disk import DiskLatents, training_images
from dsmoe.preprocess.memory import LatentBatch, posterior_of

ROOT = Path(__file__).resolve().parents[1]
BATCH, TURNS, TURN_BATCHES = 32, 5, 3


class Turn(NamedTuple):
    """One turn: images a second from either side, batches and whether both gave the same bits."""

    images: float
    cache: float
    same: bool


def main(argv: list[str]) -> int:
    """Build, measure, print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, metavar="FOLDER", help="images, one sub-folder a class")
    parser.add_argument("--taesd", required=True, metavar="FOLDER", help="the codec's two files")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--write", type=Path, help="also write the table, with its circumstances, to this file")
    options = parser.parse_args(argv)
    overrides = [f"data.path={options.photos}", f"codec.path={options.taesd}", f"data.resolution={options.resolution}"]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        seconds = built(cache, overrides)
        turns = measured(load_recipe("photos", overrides), LatentCache(cache))
        size = sum(path.stat().st_size for path in cache.iterdir())
        text = table(turns, LatentCache(cache), seconds, size)
    print(text)
    if options.write:
        options.write.write_text(document(text, options), encoding="utf-8")
    return 0 if all(turn.same and turn.cache > turn.images for turn in turns) else 1


def built(cache: Path, overrides: list[str]) -> float:
    """Seconds that the launcher took, start of the process included."""
    started = time.perf_counter()
    command = [sys.executable, "launchers/cache_latents.py", "--out", cache, "--recipe", "photos", *overrides]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    subprocess.run([str(word) for word in command], cwd=ROOT, env=environ, check=True)
    return time.perf_counter() - started


def measured(recipe: Recipe, cache: LatentCache) -> list[Turn]:
    """TURNS pairs of turns over the same batches."""
    codec, dataset = build_codec(recipe.codec.name, recipe.codec.path), training_images(recipe)
    layout, order = BatchLayout(global_batch=BATCH, micro_batch=BATCH), SampleOrder(0, len(dataset))
    turns = []
    for number in range(TURNS):
        span = {"start_step": number * TURN_BATCHES, "num_steps": TURN_BATCHES, "flip": True}
        slow, slow_rate = timed(lambda span=span: BatchLoader(dataset, order, layout, **span), codec)
        fast, fast_rate = timed(lambda span=span: DiskLatents(cache).micro_batches(order, layout, **span), codec)
        same = all(torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std) for a, b in zip(slow, fast, strict=True))
        turns.append(Turn(slow_rate, fast_rate, same))
    return turns


def timed(batches: Callable[[], Iterable[Batch | LatentBatch]], codec: Codec) -> tuple[list[Posterior], float]:
    """All their posteriors and how many images a second that was."""
    started = time.perf_counter()
    taken = [posterior_of(batch, codec) for batch in batches()]
    return taken, len(taken) * BATCH / (time.perf_counter() - started)


def table(turns: list[Turn], cache: LatentCache, seconds: float, size: int) -> str:
    """Markdown."""
    rates = {name: [getattr(turn, name) for turn in turns] for name in ("images", "cache")}
    rows = [
        f"| {name} | {statistics.median(values):,.0f} | {min(values):,.0f} to {max(values):,.0f} |"
        for name, values in rates.items()
    ]
    ratio = statistics.median(turn.cache / turn.images for turn in turns)
    same = "the same bits" if all(turn.same for turn in turns) else "NOT THE SAME BITS"
    views = len(cache) * cache.header.views
    return "\n".join(
        [
            "| batches from | images/s, median | range over the turns |",
            "|---|---|---|",
            *rows,
            "",
            f"The cache is {ratio:,.0f} times as fast (median over the pairs of turns) and gave {same}.",
            f"Building it took {seconds:.1f} s with one process, its start included: {len(cache)} images, {views} "
            f"views, {len(cache) / seconds:.1f} images/s, {size / 2**20:.1f} MiB.",
        ]
    )


def document(text: str, options: argparse.Namespace) -> str:
    """The table with what it was made of."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"""# Training batches from a latent cache and from images, {date.today()}

`python benchmarks/latent_cache.py --photos FOLDER --taesd FOLDER`, commit {commit}, Python {platform.python_version()},
torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} CPUs ({cpus[0].split(":")[1].strip()}),
no GPU; load average over the last minute {os.getloadavg()[0]:.1f} (this benchmark alone makes at most
{torch.get_num_threads()}). 800 ImageNet photos at {options.resolution} px through TAESD, float32, both views;
micro-batches of {BATCH} in training order; {TURNS} pairs of turns of {TURN_BATCHES} batches, no loader process. From
images is decode, crop, mirror and encode, as codec.cache=none does in each step; from the cache is a read of mapped
files, which lay in memory.

{text}
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
