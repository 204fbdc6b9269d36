"""Training from a latent cache: the same micro-batches as from images, and only from the right cache."""

import threading
from pathlib import Path

import pytest
import torch
from made_cache import made, recipe
from made_codec import Halving, Noise

from dsmoe.base.diffusion import DiffusionSpec
from dsmoe.base.errors import ConfigError
from dsmoe.data.latent_cache import LatentCache
from dsmoe.data.loader import BatchLoader
from dsmoe.data.order import BatchLayout, SampleOrder
from dsmoe.preprocess.disk import AHEAD, DiskLatents, images_are_here, open_cache
from dsmoe.preprocess.memory import posterior_of
from dsmoe.tasks.class_conditional import ClassConditional

TOTAL = 70


def layout(world: int = 1, rank: int = 0) -> BatchLayout:
    return BatchLayout(global_batch=12, micro_batch=3, world_size=world, rank=rank)


@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 1)])
def test_cache_and_images_give_the_same_draws(tmp_path, world, rank):
    """Posterior sample, time, noise and label of every sample, over more than one epoch and both views."""
    dataset, codec = Noise(TOTAL), Halving()
    disk = DiskLatents(made(tmp_path / "cache", dataset))
    task = ClassConditional(num_classes=3, label_dropout=0.1, seed=2, diffusion=DiffusionSpec())
    span = {"start_step": 3, "num_steps": 8, "flip": True}
    images = list(BatchLoader(dataset, SampleOrder(4, TOTAL), layout(world, rank), **span))
    latents = list(disk.micro_batches(SampleOrder(4, TOTAL), layout(world, rank), **span))
    assert len(images) == 32 // world
    for a, b in zip(images, latents, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.items, b.items)
        want = task.training_inputs(posterior_of(a, codec), a.labels, a.index)
        got = task.training_inputs(posterior_of(b, codec), b.labels, b.index)
        for name in ("x0", "t", "noise", "y"):
            assert torch.equal(getattr(want, name), getattr(got, name)), name


def test_a_missing_std_is_zero(tmp_path):
    class Sharp(Halving):
        deterministic = True

    codec = Sharp(deterministic=True)
    disk = DiskLatents(made(tmp_path / "cache", Noise(TOTAL), codec))
    batch = next(disk.micro_batches(SampleOrder(0, TOTAL), layout(), num_steps=1))
    assert not batch.posterior.std.any()
    assert batch.posterior.mean.any()


def test_reading_ahead_is_bounded_and_ends_with_the_generator(tmp_path, monkeypatch):
    cache, reads = made(tmp_path / "cache", Noise(TOTAL)), []
    plain = LatentCache.read

    def read(self, items, mirrored):
        reads.append(threading.current_thread())
        return plain(self, items, mirrored)

    monkeypatch.setattr(LatentCache, "read", read)
    batches = DiskLatents(cache).micro_batches(SampleOrder(0, TOTAL), layout(), num_steps=100)
    next(batches)
    batches.close()
    assert 1 <= len(reads) <= AHEAD + 1
    assert threading.main_thread() not in reads
    assert not any(thread.is_alive() for thread in reads)


def test_what_goes_wrong_in_the_thread_is_raised_where_batches_are_taken(tmp_path, monkeypatch):
    cache = made(tmp_path / "cache", Noise(TOTAL))

    def fail(self, items, mirrored):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LatentCache, "read", fail)
    with pytest.raises(OSError, match="Input/output"):
        list(DiskLatents(cache).micro_batches(SampleOrder(0, TOTAL), layout(), num_steps=2))


def spec(folder: Path, **data: object):
    codec = {"name": "none", "cache": "disk", "cache_path": str(folder), "cache_dtype": data.pop("dtype", "float32")}
    return recipe(data={"resolution": 8, "flip": True, **data}, codec=codec)


def test_the_right_cache_opens_with_images_and_without(tmp_path):
    made(tmp_path / "cache", Noise(TOTAL))
    for images in (Noise(TOTAL), None):
        cache = open_cache(spec(tmp_path / "cache"), Halving(), images, "MAKE IT")
        assert (len(cache), cache.class_names) == (TOTAL, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("path", "here"),
    [
        ("photos", True),
        ("photos/*.tar", True),
        ("photos/a-{000..100}.tar", True),
        ("gone", False),
        ("gone/*.tar", False),
    ],
)
def test_images_are_looked_for_where_their_path_points(tmp_path, monkeypatch, path, here):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in (path, str(tmp_path / path)):
        assert images_are_here(recipe(data={"source": "image_folder", "path": name})) == here
    assert images_are_here(recipe())


def test_a_cache_with_both_views_serves_a_run_without_flip(tmp_path):
    made(tmp_path / "cache", Noise(TOTAL))
    assert open_cache(spec(tmp_path / "cache", flip=False), Halving(), None, "MAKE IT").header.flip


class Renamed(Noise):
    class_names = ("a", "b", "z")


def _codec(**changes: str) -> Halving:
    codec = Halving()
    codec.provenance = {**codec.provenance, **changes}
    return codec


MISMATCHES = {
    "codec name": ({"codec": _codec(name="sd")}, "codec name is halving in the cache and sd in the recipe"),
    "codec hash": ({"codec": _codec(sha256="12")}, "in the cache and 12 in the recipe"),
    "scale": ({"codec": _codec(scale="0.18215")}, "codec scale is 1.0 in the cache and 0.18215 in the recipe"),
    "factor": ({"codec": _codec(factor="8")}, "codec factor is 2 in the cache and 8 in the recipe"),
    "resolution": ({"data": {"resolution": 16}}, "resolution is 8 in the cache and 16 in the recipe"),
    "dtype": ({"data": {"dtype": "bfloat16"}}, "dtype is float32 in the cache and bfloat16 in the recipe"),
    "source": (
        {"data": {"source": "image_folder", "path": "PHOTOS"}},
        "source is scenes in the cache and image_folder in the recipe",
    ),
    "items": ({"images": Noise(TOTAL - 1)}, "items is 70 in the cache and 69 in the recipe"),
    "fingerprint": ({"images": Renamed(TOTAL)}, "fingerprint is"),
    "class names": ({"images": Renamed(TOTAL)}, "class names is ('a', 'b', 'c') in the cache and ('a', 'b', 'z')"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_another_cache_is_refused_naming_both_sides(tmp_path, case):
    changes, says = MISMATCHES[case]
    made(tmp_path / "cache", Noise(TOTAL))
    with pytest.raises(ConfigError) as caught:
        open_cache(
            spec(tmp_path / "cache", **dict(changes.get("data", {}))),
            changes.get("codec", Halving()),
            changes.get("images"),
            "MAKE IT",
        )
    line = str(caught.value)
    for words in (says, "build one: MAKE IT"):
        assert words in line
    assert line.count("in the recipe") == (2 if case in ("items", "fingerprint", "class names") else 1), line


def test_another_crop_is_refused(tmp_path, monkeypatch):
    made(tmp_path / "cache", Noise(TOTAL))
    monkeypatch.setattr("dsmoe.preprocess.disk.CROP", "random")
    with pytest.raises(ConfigError, match="crop is adm-centre in the cache and random in the recipe"):
        open_cache(spec(tmp_path / "cache"), Halving(), None, "MAKE IT")


def test_a_run_with_flip_refuses_plain_views(tmp_path):
    made(tmp_path / "cache", Noise(TOTAL), flip=False)
    with pytest.raises(ConfigError, match=r"views are plain only in the cache and plain and mirrored in the recipe"):
        open_cache(spec(tmp_path / "cache"), Halving(), None, "MAKE IT")
