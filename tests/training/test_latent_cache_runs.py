"""Pretraining from a latent cache is pretraining from its images, also when a run changes from one to the other."""

import json
import re
from pathlib import Path

import pytest
import torch
from distributed_harness import assert_succeeded, launch
from made_images import png

from dsmoe import codec as codecs
from dsmoe.base.errors import ConfigError, DataError
from dsmoe.data.image_folder import ImageFolder
from dsmoe.data.latent_cache import LatentCache
from dsmoe.data.transforms import to_float
from dsmoe.evaluation.command import run as run_command
from dsmoe.preprocess.cache_command import parser, work
from dsmoe.runtime.distributed import discover
from dsmoe.runtime.stopping import EXIT_STOPPED
from dsmoe.training.prepare import parse_command, prepare

INTERRUPTED = Path(__file__).with_name("interrupted_run.py")
SIDE, ITEMS, BATCH, STEPS = 16, 12, 8, 4
FIGURES = ("step", "images_seen", "loss", "mse", "vb", "balance", "grad_norm", "lr")
TINY = [
    "model.preset=nano-4E2A", "model.depth=2", "model.dim=32", "model.heads=2", "model.patch=1",
    f"train.global_batch={BATCH}", f"train.images={STEPS * BATCH}", "optimizer.warmup_images=16",
    "report.samples=2", "report.sample_steps=2", "report.sample_every=0", "report.log_every=8",
    "checkpoint.every=0", "ema.half_life_images=20",
]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of 12 pictures (an epoch and a half of them is trained), an engine, and the latents of kl-small."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for i in range(ITEMS):
        path = tmp_path / "photos" / f"c{i // 6}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    (tmp_path / "engine.json").write_text(json.dumps({"dsmoe": {"about": "test"}, "zero_optimization": {"stage": 1}}))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have
    assert run_command(parser("test"), ["--out", str(tmp_path / "cache"), *data(tmp_path)], work, {}) == 0
    torch.set_num_threads(threads)
    return tmp_path


def data(place: Path) -> list[str]:
    codec = ("codec.name=kl-small", "codec.path=null")
    return [
        "--recipe",
        "photos",
        f"data.path={place / 'photos'}",
        f"data.resolution={SIDE}",
        *codec,
        "codec.cache=none",
    ]


def from_cache(place: Path) -> list[str]:
    return ["codec.cache=disk", f"codec.cache_path={place / 'cache'}"]


def arguments(place: Path, run: str, *more: str) -> list[str]:
    return ["--deepspeed_config", str(place / "engine.json"), "--run", str(place / run), *data(place), *TINY, *more]


def train(place: Path, run: str, *more: str, stop: int = 0) -> list:
    return launch([INTERRUPTED, "SIGUSR1", 0, stop, *arguments(place, run, *more)], 2, timeout=120, preloaded=True)


def figures(place: Path, run: str) -> list[dict]:
    rows = [json.loads(line) for line in (place / run / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in FIGURES} for row in rows]


def same_bits(place: Path) -> bool:
    """Whether the codec encodes to the same bits in the run's micro-batches as in the cache's batches."""
    torch.set_num_threads(1)
    images = ImageFolder(place / "photos", SIDE)
    micro = torch.stack([torch.from_numpy(images.read(i)[0]).permute(2, 0, 1) for i in range(BATCH // 2)])
    posterior = codecs.build("kl-small").encode(to_float(micro))
    cached, _ = LatentCache(place / "cache").read(torch.arange(len(micro)), torch.zeros(len(micro), dtype=torch.bool))
    return torch.equal(cached[:, 0], posterior.mean) and torch.equal(cached[:, 1], posterior.std)


@pytest.mark.distributed
def test_a_run_from_the_cache_without_images_goes_on_a_run_from_images(place):
    assert_succeeded(train(place, "images"))
    stopped = train(place, "both", stop=1)
    assert [rank.returncode for rank in stopped] == [EXIT_STOPPED] * 2
    exact = same_bits(place)
    (place / "photos").rename(place / "away")
    resumed = train(place, "both", *from_cache(place))
    assert_succeeded(resumed)
    seen = int(re.search(r"resumed at (\d+) images", resumed[0].stderr)[1])
    assert 0 < seen < STEPS * BATCH
    assert (place / "both/samples/images-000000032.png").exists()
    want, got = figures(place, "images"), figures(place, "both")
    assert [row["images_seen"] for row in got] == [8, 16, 24, 32]
    assert want[: seen // BATCH] == got[: seen // BATCH]
    if exact:  # so it is on every CPU that was tried
        assert want == got
    for a, b in zip(want, got, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)


def planned(place: Path, *more: str):
    return prepare(parse_command(arguments(place, "run", *more), ""), discover({})).plan


def test_the_plan_is_the_same_science_and_names_come_from_the_cache(place):
    images = planned(place)
    (place / "photos").rename(place / "away")
    cached = planned(place, *from_cache(place))
    assert cached.science_hash == images.science_hash
    assert (cached.data, cached.model, cached.codec) == (images.data, images.model, images.codec)
    assert any("cache_latents.py --out DIR --recipe photos" in text for text in images.warnings)
    assert not any("cache_latents" in text for text in cached.warnings)
    assert any("photos is not here" in text for text in cached.warnings)


def test_a_missing_cache_names_the_command_that_builds_it(place):
    with pytest.raises(DataError) as caught:
        planned(place, "codec.cache=disk", f"codec.cache_path={place / 'nowhere'}")
    command = str(caught.value).split("build it: ")[1]
    assert command.startswith("python launchers/cache_latents.py --out DIR --recipe photos data.path=")
    assert "codec.name=kl-small" in command
    assert "codec.cache" not in command


def test_photos_that_changed_since_are_refused(place):
    (place / "photos/c1/new.png").write_bytes(png(99))
    with pytest.raises(ConfigError, match="items is 12 in the cache and 13 in the recipe"):
        planned(place, *from_cache(place))


def test_rounded_latents_have_to_be_asked_for(place):
    out = ["--out", str(place / "short"), "--dtype", "bfloat16", *data(place)]
    assert run_command(parser("test"), out, work, {}) == 0
    short = ("codec.cache=disk", f"codec.cache_path={place / 'short'}")
    with pytest.raises(ConfigError, match="dtype is bfloat16 in the cache and float32 in the recipe"):
        planned(place, *short)
    plan = planned(place, *short, "codec.cache_dtype=bfloat16")
    assert any("rounded to bfloat16" in text for text in plan.warnings)
