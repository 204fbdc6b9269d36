"""How fast are photos read? Folders, tars and parquet through our loader against a plain PIL loop over the same files.

    python benchmarks/decode.py [--photos DIR] [--resolution 256] [--workers 0 1 2] [--turns 8]
        [--write benchmarks/results/NAME]

DIR holds class folders; without it photos are made. All sides crop alike. Each turn of a side is paired with one of the
plain loop right before or after it, so that a drifting machine hits both alike; a loader waits, its queue full, while
others have their turn, and what stood in the queue is taken before the clock starts. The files lie in the page cache:
this measures decoding and our overhead, not a disk. Beside it: row groups of parquet decoded for each image, and the
time to index.
"""

import argparse
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import numpy as np
import PIL
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

from dsmoe.data import build_dataset, parquet
from dsmoe.data.loader import BatchLoader
from dsmoe.data.order import BatchLayout, SampleOrder, requests

ROOT = Path(__file__).resolve().parents[1]
BATCH, PREFETCH = 16, 2
SOURCES = {"image_folder": "folder", "webdataset": "tars", "parquet": "parquet"}
GROUP = 100  # rows a group, as the hub's ImageNet has
SETTLE_SECONDS = 0.7  # in which workers fill their queue


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="class folders of real photos")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--turns", type=int, default=8, help="turns of each side")
    parser.add_argument("--batches", type=int, default=4, help=f"batches of {BATCH} images in a turn")
    parser.add_argument("--write", type=Path, help="also write NAME.json and NAME.md")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photos = given.photos or make_photos(Path(folder) / "made")
        paths = make_forms(photos, Path(folder))
        found = {
            "about": circumstances(photos, given),
            "images_per_second": take_turns(paths, given),
            "groups_per_image": amplification(Path(folder)),
            "index": index_times(Path(folder), paths),
        }
    text = report(found, given)
    print(text)
    if given.write:
        given.write.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        given.write.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return 0


def make_photos(root: Path) -> Path:
    """256 smooth JPEGs of ImageNet's usual size."""
    rng = np.random.default_rng(0)
    for i in range(256):
        (root / f"c{i % 8}").mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (25, 33, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(root / f"c{i % 8}" / f"{i}.jpg", quality=92)
    return root


def make_forms(photos: Path, root: Path) -> dict[str, Path]:
    """{source: data.path} of the same photos in the same order, a hundred in a tar or file."""
    files = sorted(photos.glob("*/*"))
    classes = {name: n for n, name in enumerate(sorted({file.parent.name for file in files}))}
    for number, first in enumerate(range(0, len(files), 100)):
        part = files[first : first + 100]
        contents, labels = [file.read_bytes() for file in part], [classes[file.parent.name] for file in part]
        rows = enumerate(zip(contents, labels, strict=True), first)
        write_tar(root / "tars" / f"photos-{number:04d}.tar", ((f"{i:08d}", *row) for i, row in rows))
        write_parquet(root / "parquet" / f"photos-{number:05d}.parquet", contents, labels)
    return {"image_folder": photos, "webdataset": root / "tars", "parquet": root / "parquet"}


def write_tar(path: Path, samples: Iterator[tuple[str, bytes, int]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for key, image, label in samples:
            for kind, content in (("jpg", image), ("cls", str(label).encode()), ("json", b"{}")):
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, contents: list[bytes], labels: list[int]) -> None:
    path.parent.mkdir(exist_ok=True)
    table = pyarrow.table({"image": [{"bytes": content, "path": None} for content in contents], "label": labels})
    pyarrow.parquet.write_table(table, path, row_group_size=GROUP)


def take_turns(paths: dict[str, Path], given: argparse.Namespace) -> list[dict]:
    """Of every side, and of the plain loop beside it: images a second and CPU seconds of this process, by turn."""
    files = sorted(paths["image_folder"].glob("*/*"))
    wanted = SampleOrder(0, len(files)).items(torch.arange(64 * len(files))).tolist()
    sides = []
    for source, path in paths.items():
        for workers in given.workers:
            dataset = build_dataset(source, path=path, resolution=given.resolution)
            name = {"source": SOURCES[source], "workers": workers}
            sides.append((name, loader_side(dataset, workers, given), {"ours": [], "plain": []}))
    plain = plain_side(files, wanted, given)
    for _, turn, _ in sides:  # imports, page cache, row groups, worker start
        turn()
    for number in range(given.turns):
        for name, turn, kept in sides if number % 2 == 0 else reversed(sides):
            both = {"ours": turn, "plain": plain}
            for which in both if number % 2 == 0 else reversed(both):
                time.sleep(SETTLE_SECONDS if name["workers"] else 0)
                kept[which].append(timed(both[which], given))
    return [{**name, **kept} for name, _, kept in sides]


def timed(turn: Callable[[], None], given: argparse.Namespace) -> dict[str, float]:
    turn(ready=True)
    images, begun, cpu = given.batches * BATCH, time.perf_counter(), time.process_time()
    turn()
    elapsed, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return {"rate": images / elapsed, "cpu": cpu / images}


def loader_side(dataset: object, workers: int, given: argparse.Namespace) -> Callable[..., None]:
    """Reads one turn's batches; with ready, only what the workers have read already."""
    order, layout = SampleOrder(0, len(dataset)), BatchLayout(global_batch=BATCH, micro_batch=BATCH)
    loader = BatchLoader(dataset, order, layout, num_steps=100_000, workers=workers, prefetch=PREFETCH)
    batches = iter(loader)

    def turn(ready: bool = False) -> None:
        for _ in range(workers * PREFETCH if ready else given.batches):
            next(batches)

    return turn


def plain_side(files: list[Path], wanted: list[int], given: argparse.Namespace) -> Callable[..., None]:
    """What one would write by hand: open, convert, ADM's crop, stack."""
    size, items = given.resolution, itertools.cycle(wanted)

    def one(path: Path) -> np.ndarray:
        image = Image.open(path).convert("RGB")
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return np.asarray(image.crop((left, top, left + size, top + size)))

    def turn(ready: bool = False) -> None:
        for _ in range(0 if ready else given.batches):
            images = np.stack([one(files[next(items)]) for _ in range(BATCH)])
            torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

    return turn


def amplification(root: Path) -> list[dict]:
    """Row groups decoded for each image that rank 0 reads in an epoch, with a cache as large as ImageNet's would be.

    512 groups of 100 rows; the cache holds 48, as CACHE_BYTES holds of ImageNet's (100 rows of 110 kB).
    """
    rows, batch = 51_200, 256
    path = root / "rows" / "rows.parquet"
    write_parquet(path, [bytes(100)] * rows, [0] * rows)
    one = build_dataset("parquet", path=path, resolution=8)
    one.content(0)
    parquet.CACHE_BYTES = 48 * one._groups[0].nbytes
    found = []
    for world, workers in ((1, 1), (8, 1), (8, 4), (64, 1)):
        for block in (0, GROUP):
            datasets = [build_dataset("parquet", path=path, resolution=8) for _ in range(workers)]
            order = SampleOrder(0, rows, block=block, global_batch=batch)
            layout = BatchLayout(global_batch=batch, micro_batch=batch // world, world_size=world)
            wanted = requests(order, layout, start_step=0, num_steps=rows // batch, flip=False)
            for number, want in enumerate(wanted):
                for item in want.items.tolist():
                    datasets[number % workers].content(item)
            decoded = sum(dataset.groups_decoded for dataset in datasets)
            found.append({"ranks": world, "workers": workers, "block": block, "groups": decoded / (rows // world)})
    return found


def index_times(root: Path, paths: dict[str, Path]) -> dict[str, float]:
    """Seconds: one process indexes 10,000 samples in 10 tars, then opens the kept index; a folder is listed."""
    for number in range(10):
        rows = ((f"{number:04d}{i:04d}", bytes(1000), i) for i in range(1000))
        write_tar(root / "many" / f"many-{number:04d}.tar", rows)

    def seconds(source: str, path: Path) -> float:
        begun = time.perf_counter()
        build_dataset(source, path=path, resolution=8)
        return time.perf_counter() - begun

    return {
        "index 10,000 samples (30,000 members) in 10 tars": seconds("webdataset", root / "many"),
        "open that index again": seconds("webdataset", root / "many"),
        f"list the folder of {len(sorted(paths['image_folder'].glob('*/*')))} photos": seconds(
            "image_folder", paths["image_folder"]
        ),
    }


def circumstances(photos: Path, given: argparse.Namespace) -> dict:
    files = sorted(photos.glob("*/*"))
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "photos": f"{len(files)} {'real' if given.photos else 'made'} photos",
        "mean_kilobytes": round(statistics.mean(file.stat().st_size for file in files) / 1000, 1),
        "resolution": given.resolution,
        "machine": f"{model}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, Pillow {PIL.__version__}, pyarrow {pyarrow.__version__}, "
        f"torch {torch.__version__}",
        "commit": commit(),
        "load": round(os.getloadavg()[0], 1),
    }


def spread(values: list[float]) -> str:
    """Median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def row(side: dict) -> str:
    ours, plain = side["ours"], side["plain"]
    ratios = [a["rate"] / b["rate"] for a, b in zip(ours, plain, strict=True)]
    cpu = [a["cpu"] / b["cpu"] for a, b in zip(ours, plain, strict=True)]
    rates = (spread([turn["rate"] for turn in which]) for which in (ours, plain))
    columns = [side["source"], str(side["workers"]), *rates, spread(ratios), spread(cpu) if not side["workers"] else ""]
    return f"| {' | '.join(columns)} |"


def report(found: dict, given: argparse.Namespace) -> str:
    about = found["about"]
    lines = [
        f"# Reading photos, {date.today()}",
        "",
        f"`PYTHONPATH=. python benchmarks/decode.py{' --photos DIR' * bool(given.photos)}`: {about['photos']} of "
        f"{about['mean_kilobytes']} kB on average, cropped to {about['resolution']} pixels. {about['machine']}; "
        f"{about['versions']}; commit {about['commit']}; load average before {about['load']}. Median and quartiles of "
        f"{given.turns} turns of {given.batches * BATCH} images, each paired with a turn of a plain PIL loop over the "
        "same files; ratios are taken pair by pair. The files are in the page cache.",
        "",
        "| source | workers | images/s | plain loop, images/s | ours / plain | CPU time an image, ours / plain |",
        "|---|---|---|---|---|---|",
        *map(row, found["images_per_second"]),
        "",
        "Row groups of parquet that rank 0 decodes for each image, groups of 100 rows, global batch 256, and a cache "
        "that holds 48 groups (512 MiB of ImageNet's); 0.01 is each group once:",
        "",
        "| ranks | workers a rank | shuffle_block 0 | shuffle_block 100 |",
        "|---|---|---|---|",
    ]
    rows = found["groups_per_image"]
    for plain, blocks in zip(rows[::2], rows[1::2], strict=True):
        lines.append(f"| {plain['ranks']} | {plain['workers']} | {plain['groups']:.3f} | {blocks['groups']:.3f} |")
    lines += ["", "| once | seconds |", "|---|---|"]
    lines += [f"| {name} | {value:.3g} |" for name, value in found["index"].items()]
    return "\n".join(lines)


def commit() -> str:
    """The checkout's commit, marked when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
