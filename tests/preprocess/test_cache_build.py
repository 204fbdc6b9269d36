"""Building latent caches in one process: their content, and what survives kills, stops, damage and other jobs."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from made_cache import content, job, made, rows, truth
from made_codec import CLASSES, Halving, Noise
from made_images import good_and_bad

from dsmoe import codec as codecs
from dsmoe.base.errors import ConfigError, DataError, TrainingFailure
from dsmoe.data.image_folder import ImageFolder
from dsmoe.data.latent_cache import ENCODE_BATCH, LatentCache
from dsmoe.preprocess import cache_folder
from dsmoe.preprocess.cache_build import build
from dsmoe.runtime.stopping import StopRequest

TOTAL = 70  # shards of 32, 32 and 6


@pytest.mark.parametrize("flip", [True, False])
def test_the_files_hold_the_moments_of_every_item_and_view(tmp_path, flip):
    made(tmp_path / "cache", Noise(TOTAL), flip=flip)
    found = rows(tmp_path / "cache")
    assert found["moments"].shape == (TOTAL, 2 if flip else 1, 2, 3, 4, 4)
    assert found["labels"].tolist() == [i % CLASSES for i in range(TOTAL)]
    assert not found["damaged"].any()
    assert not (tmp_path / "cache/building").exists()
    for item in range(TOTAL):
        for view in range(found["moments"].shape[1]):
            mean, std = truth(item, bool(view))
            # to_float rounds twice in float32 at values up to 2.
            np.testing.assert_allclose(found["moments"][item, view, 0], mean, rtol=0, atol=2**-22)
            np.testing.assert_allclose(found["moments"][item, view, 1], std, rtol=0, atol=2**-22)


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 11), ("bfloat16", 8)])
def test_shorter_types_are_the_rounded_latents(tmp_path, dtype, digits):
    items, mirrored = torch.arange(TOTAL), torch.arange(TOTAL) % 2 == 1
    exact, _ = made(tmp_path / "exact", Noise(TOTAL)).read(items, mirrored)
    short, _ = made(tmp_path / "short", Noise(TOTAL), dtype=dtype).read(items, mirrored)
    assert torch.equal(short, exact.to(getattr(torch, dtype)).float())
    assert 0 < (short - exact).abs().max() <= 2.0**-digits


def test_a_deterministic_codec_stores_no_std(tmp_path):
    cache = made(tmp_path / "cache", Noise(TOTAL), codecs.build("none"))
    assert cache.header.deterministic
    assert rows(tmp_path / "cache")["moments"].shape == (TOTAL, 2, 1, 3, 8, 8)


@pytest.mark.parametrize("name", ["none", "kl-small"])
def test_codecs_say_whether_their_std_is_zero(name):
    codec = codecs.build(name)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert codec.deterministic == bool((codec.encode(images).std == 0).all())


def test_every_batch_has_one_size(tmp_path):
    codec = Halving()
    made(tmp_path / "cache", Noise(TOTAL), codec)
    assert codec.batches == [ENCODE_BATCH] * 6  # three batches, two views; the last one padded from 6


def test_workers_change_no_byte(tmp_path):
    made(tmp_path / "a", Noise(TOTAL))
    made(tmp_path / "b", Noise(TOTAL), workers=1)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_stopped_build_goes_on_and_keeps_finished_shards(tmp_path):
    made(tmp_path / "whole", Noise(TOTAL))
    stop, codec = StopRequest(), Halving()
    stop.asked = True
    assert build(job(tmp_path / "cache", Noise(TOTAL), codec, stop=stop)) is False
    assert codec.encoded == 2 * ENCODE_BATCH, "the shard that was begun is finished"
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {"latents-00000-of-00003.safetensors", "building"}
    codec = Halving()
    made(tmp_path / "cache", Noise(TOTAL), codec)
    assert codec.encoded == 2 * 2 * ENCODE_BATCH
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


def _halfway(folder: Path) -> Path:
    """A build that was stopped after its first shard."""
    stop = StopRequest()
    stop.asked = True
    build(job(folder, Noise(TOTAL), stop=stop))
    return folder / "latents-00000-of-00003.safetensors"


def _flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        _flip_a_byte,
        lambda shard: shard.write_bytes(shard.read_bytes()[:-1]),
        lambda shard: shard.unlink(),
        lambda shard: (shard.parent / "building/00000.json").unlink(),
        lambda shard: (shard.parent / "building/00000.json").write_text('{"byt'),
        lambda shard: (shard.parent / f".{shard.name}.999.tmp").write_bytes(b"left by a killed job"),
    ],
    ids=["flipped byte", "cut", "gone", "no record", "half a record", "left-over"],
)
def test_going_on_keeps_only_whole_shards(tmp_path, spoil):
    made(tmp_path / "whole", Noise(TOTAL))
    spoil(_halfway(tmp_path / "cache"))
    made(tmp_path / "cache", Noise(TOTAL))
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


def test_a_complete_cache_is_left_alone(tmp_path):
    made(tmp_path / "cache", Noise(TOTAL))
    before, codec = content(tmp_path / "cache"), Halving()
    made(tmp_path / "cache", Noise(TOTAL), codec)
    assert codec.encoded == 0
    assert content(tmp_path / "cache") == before


def test_a_complete_cache_that_lost_a_shard_makes_that_one_again(tmp_path):
    root = good_and_bad(tmp_path / "photos", TOTAL, {3, 40})
    made(tmp_path / "cache", ImageFolder(root, 8, max_bad_fraction=0.2))
    before, codec = content(tmp_path / "cache"), Halving()
    (tmp_path / "cache/latents-00001-of-00003.safetensors").unlink()
    with pytest.raises(DataError, match=r"latents-00001-of-00003.safetensors is missing; .* make it again"):
        LatentCache(tmp_path / "cache")
    made(tmp_path / "cache", ImageFolder(root, 8, max_bad_fraction=0.2), codec)
    assert codec.encoded == 2 * ENCODE_BATCH
    assert content(tmp_path / "cache") == before


class _OtherCodec(Halving):
    def __init__(self) -> None:
        super().__init__()
        self.provenance = {**self.provenance, "sha256": "cd" * 32}


CHANGES = [
    ({"codec": _OtherCodec()}, ("codec sha256 is abab", "in the folder and cdcd")),
    ({"flip": False}, ("flip is True in the folder and False in this command",)),
    ({"dtype": "bfloat16"}, ("dtype is float32 in the folder and bfloat16 in this command",)),
    ({"dataset": Noise(TOTAL + 1)}, ("items is 70 in the folder and 71 in this command", "fingerprint is")),
]


@pytest.mark.parametrize(("changes", "says"), CHANGES, ids=lambda c: next(iter(c), "") if isinstance(c, dict) else "")
@pytest.mark.parametrize("complete", [True, False])
def test_going_on_with_something_else_is_refused(tmp_path, changes, says, complete):
    folder = tmp_path / "cache"
    if complete:
        made(folder, Noise(TOTAL))
    else:
        _halfway(folder)
    before = content(folder)
    with pytest.raises(ConfigError) as caught:
        build(job(folder, changes.get("dataset", Noise(TOTAL)), **{k: v for k, v in changes.items() if k != "dataset"}))
    for words in (*says, "Give another --out"):
        assert words in str(caught.value)
    assert content(folder) == before


def test_another_crop_is_refused(tmp_path, monkeypatch):
    _halfway(tmp_path / "cache")
    other = job(tmp_path / "cache", Noise(TOTAL))
    other.folder.header = dataclasses.replace(other.header, crop="random")
    with pytest.raises(ConfigError, match="crop is adm-centre in the folder and random in this command"):
        build(other)


def test_folders_of_other_things_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        build(job(tmp_path / "file", Noise(TOTAL)))
    with pytest.raises(ConfigError, match="not empty and holds no latent cache"):
        build(job(tmp_path / "full", Noise(TOTAL)))
    assert content(tmp_path) == {"file": b"x", "full/x": b"x"}


def test_the_disk_is_asked_before_anything_is_encoded(tmp_path, monkeypatch):
    codec = Halving()
    usage = shutil.disk_usage(tmp_path)._replace(free=65 << 20)
    monkeypatch.setattr(cache_folder.shutil, "disk_usage", lambda path: usage)
    size = job(tmp_path / "cache", Noise(TOTAL)).header.item_bytes * 2000 / 2**30
    with pytest.raises(ConfigError, match=rf"needs {size:.3g} GiB more .* and 0\.0635 GiB are free"):
        build(job(tmp_path / "cache", Noise(2000), codec))
    assert codec.encoded == 0
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_one_line_and_the_build_goes_on_later(tmp_path, monkeypatch):
    made(tmp_path / "whole", Noise(TOTAL))
    plain, calls = cache_folder.save_file, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return plain(*args, **kwargs)

    monkeypatch.setattr(cache_folder, "save_file", full)
    with pytest.raises(DataError, match=r"latents-00001.* cannot be written \(No space left on device\)"):
        build(job(tmp_path / "cache", Noise(TOTAL)))
    assert [p.name for p in tmp_path.glob("cache/*.safetensors")] == ["latents-00000-of-00003.safetensors"]
    made(tmp_path / "cache", Noise(TOTAL))
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


def test_a_job_that_was_taken_over_writes_nothing_more(tmp_path):
    class TakenOver(Halving):
        def encode(self, images):
            if self.encoded == 2 * ENCODE_BATCH:  # at the second shard another job starts
                job(tmp_path / "cache", Noise(TOTAL)).folder.start()
            return super().encode(images)

    with pytest.raises(TrainingFailure, match=r"taken over by a later job \(lease 2, ours 1\)"):
        build(job(tmp_path / "cache", Noise(TOTAL), TakenOver()))
    assert [p.name for p in tmp_path.glob("cache/*.safetensors")] == ["latents-00000-of-00003.safetensors"]
    assert not (tmp_path / "cache/manifest.json").exists()


def test_latents_that_are_not_finite_are_not_kept(tmp_path):
    class Broken(Halving):
        def encode(self, images):
            posterior = super().encode(images)
            posterior.mean[0, 0, 0, 0] = float("nan")
            return posterior

    with pytest.raises(DataError, match="not finite in float32"):
        build(job(tmp_path / "cache", Noise(TOTAL), Broken()))
    assert not list(tmp_path.glob("cache/*.safetensors"))


def test_damaged_images_have_stand_ins_and_are_counted(tmp_path):
    root = good_and_bad(tmp_path / "photos", TOTAL, {3, 4, 69})
    dataset = ImageFolder(root, 8, max_bad_fraction=0.2)
    cache = made(tmp_path / "cache", dataset)
    assert [name.split("/")[1] for name in cache.damaged] == [f"{i:04d}.png (not an image)" for i in (3, 4, 69)]
    found = rows(tmp_path / "cache")
    assert np.flatnonzero(found["damaged"]).tolist() == [3, 4, 69]
    for item, given in {3: 5, 4: 5, 69: 0}.items():
        assert np.array_equal(found["moments"][item], found["moments"][given])
        assert found["labels"][item] == found["labels"][given]


@pytest.mark.parametrize("bad", [range(12), [*range(8), *range(40, 44)]], ids=["one shard", "two shards"])
def test_too_much_damage_is_refused_and_nothing_counts_as_complete(tmp_path, bad):
    dataset = ImageFolder(good_and_bad(tmp_path / "photos", TOTAL, set(bad)), 8)
    with pytest.raises(DataError, match=r"of 70 images read .* are damaged .*max_bad_fraction"):
        build(job(tmp_path / "cache", dataset))
    assert not (tmp_path / "cache/manifest.json").exists()


def test_damage_in_one_shard_is_judged_against_the_whole_set(tmp_path):
    """12 damaged of the first 32 are 6 % of 200: fewer than the 10 % that are allowed."""
    dataset = ImageFolder(good_and_bad(tmp_path / "photos", 200, set(range(12))), 8, max_bad_fraction=0.1)
    assert len(made(tmp_path / "cache", dataset).damaged) == 12


def test_the_manifest_says_where_everything_comes_from(tmp_path):
    made(tmp_path / "cache", Noise(TOTAL))
    text = (tmp_path / "cache/manifest.json").read_text()
    tree = json.loads(text.split("\n", 1)[1])
    for name in ("source", "fingerprint", "crop", "dsmoe", "encode_batch", "class_names"):
        assert tree[name], name
    assert tree["codec"] == Halving().provenance
    assert (tree["resolution"], tree["flip"], tree["dtype"], tree["format"]) == (8, True, "float32", 1)
