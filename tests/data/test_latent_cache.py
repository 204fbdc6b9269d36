"""The latent cache on disk: its arithmetic and its reader. Building is in tests/preprocess."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsmoe.base.errors import DataError
from dsmoe.base.sealed import digest, seal
from dsmoe.data.latent_cache import (
    DTYPES,
    ENCODE_BATCH,
    CacheHeader,
    LatentCache,
    item_bytes,
    items_a_shard,
    mismatches,
)


def header(**changes: object) -> CacheHeader:
    facts = {
        "source": "image_folder", "fingerprint": "f" * 32, "items": 70, "class_names": ("a", "b"), "resolution": 8,
        "flip": True, "codec": {"name": "x", "sha256": "ab", "scale": "1.0", "factor": "2"}, "latent": (3, 4, 4),
        "deterministic": False, "dtype": "float32", "shard_items": 32,
    }  # fmt: skip
    return CacheHeader(**{**facts, **changes})


def write_cache(folder: Path, about: CacheHeader) -> dict[str, torch.Tensor]:
    """A cache put together by hand of random latents; returns all of them."""
    folder.mkdir()
    shape = (about.items, about.views, about.moments, *about.latent)
    whole = {
        "moments": torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[about.dtype]),
        "labels": torch.arange(about.items) % 2,
        "damaged": torch.arange(about.items) == 5,
    }
    shards = []
    for shard in range(about.shards):
        here, name = about.shard_range(shard), about.shard_name(shard)
        save_file({key: whole[key][here.start : here.stop].clone() for key in whole}, folder / name)
        damaged = [[5, "a/5", "empty file"]] if 5 in here else []
        shards.append({"name": name, **digest(folder / name), "first": here.start, "count": len(here)})
        shards[-1]["damaged"] = damaged
    content = about.to_dict() | {"shards": shards}
    (folder / "manifest.json").write_text(seal(content))
    return whole


def test_bytes_of_an_item_are_those_of_its_numbers():
    assert item_bytes((4, 32, 32), flip=True, deterministic=False, dtype="float32") == 2 * 2 * 4096 * 4 + 9
    assert item_bytes((4, 32, 32), flip=False, deterministic=True, dtype="bfloat16") == 4096 * 2 + 9


@pytest.mark.parametrize(
    ("items", "bytes_an_item", "shard_bytes", "wanted"),
    [
        (1_281_167, 65545, 1 << 30, 16352),  # ImageNet at 256 pixels: 16381 fit, whole batches of 32 count
        (800, 100, 1 << 30, 96),  # a small set is cut into about 8
        (10, 100, 1 << 30, ENCODE_BATCH),
        (10**6, 1 << 20, 1, ENCODE_BATCH),  # never less than a batch
    ],
)
def test_items_a_shard(items, bytes_an_item, shard_bytes, wanted):
    assert items_a_shard(items, bytes_an_item, shard_bytes) == wanted


def test_shards_cover_the_items_once():
    about = header()
    assert [list(about.shard_range(s)) for s in range(about.shards)] == [
        list(range(32)), list(range(32, 64)), list(range(64, 70)),
    ]  # fmt: skip
    assert about.shard_name(2) == "latents-00002-of-00003.safetensors"
    assert CacheHeader.from_dict(about.to_dict()) == about


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [True, False])
def test_random_access_gives_the_items_asked_for(tmp_path, dtype, deterministic):
    about = header(dtype=dtype, deterministic=deterministic)
    whole = write_cache(tmp_path / "cache", about)
    cache = LatentCache(tmp_path / "cache")
    items = torch.tensor([69, 0, 31, 32, 5, 5, 64])
    mirrored = torch.tensor([True, False, True, False, False, True, False])
    moments, labels = cache.read(items, mirrored)
    assert (len(cache), cache.num_classes, cache.class_names) == (70, 2, ("a", "b"))
    assert cache.damaged == ["a/5 (empty file)"]
    assert moments.dtype == torch.float32
    assert moments.shape == (7, about.moments, 3, 4, 4)
    assert labels.tolist() == [1, 0, 1, 0, 1, 1, 0]
    for row, (item, view) in enumerate(zip(items.tolist(), mirrored.tolist(), strict=True)):
        assert torch.equal(moments[row], whole["moments"][item, int(view)].float())


def test_mirrored_latents_need_a_cache_with_them(tmp_path):
    write_cache(tmp_path / "cache", header(flip=False))
    cache = LatentCache(tmp_path / "cache")
    with pytest.raises(AssertionError, match="without them"):
        cache.read(torch.tensor([1]), torch.tensor([True]))


def _resident_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_opening_maps_the_files_and_reads_nothing(tmp_path):
    about = header(items=64, latent=(4, 128, 128))
    whole = write_cache(tmp_path / "cache", about)
    size = whole["moments"].nbytes / 2**20
    assert size == 64
    del whole
    before = _resident_mib()
    cache = LatentCache(tmp_path / "cache")
    assert _resident_mib() - before < size / 4
    moments, _ = cache.read(torch.tensor([3, 40]), torch.tensor([False, True]))
    assert moments.shape == (2, 2, 4, 128, 128)
    assert _resident_mib() - before < size / 2
    maps = Path("/proc/self/maps").read_text()
    assert all(about.shard_name(shard) in maps for shard in range(about.shards))


def _shorten(folder):
    file = folder / header().shard_name(1)
    file.write_bytes(file.read_bytes()[:-1])


def _flip(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"items": 70', '"items": 71'))


def _no_safetensors(folder):
    file = folder / header().shard_name(1)
    file.write_bytes(b"\xff" * file.stat().st_size)


def _other_format(folder):
    (folder / "manifest.json").write_text(seal(header().to_dict() | {"format": 99}))


def _not_complete(folder):
    (folder / "manifest.json").unlink()
    (folder / "building").mkdir()


BAD = [
    (_shorten, ("latents-00001-of-00003.safetensors has", "bytes instead of")),
    (lambda folder: (folder / header().shard_name(2)).unlink(), ("latents-00002-of-00003.safetensors is missing",)),
    (_flip, ("manifest.json is damaged", "seal")),
    (_no_safetensors, ("latents-00001-of-00003.safetensors is damaged",)),
    (_other_format, ("manifest.json", "its format is 99, this dsmoe reads 1")),
    (_not_complete, ("is not complete", "build it: MAKE IT")),
    (lambda folder: (folder / "manifest.json").unlink(), ("holds no manifest.json", "MAKE IT")),
    (lambda folder: folder.rename(folder.with_name("away")), ("does not exist", "MAKE IT")),
]


@pytest.mark.parametrize(("break_it", "says"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_used_is_named(tmp_path, break_it, says):
    write_cache(tmp_path / "cache", header())
    break_it(tmp_path / "cache")
    with pytest.raises(DataError) as caught:
        LatentCache(tmp_path / "cache", "MAKE IT")
    for words in says:
        assert words in str(caught.value)


def test_mismatches_name_both_sides_and_cut_long_values():
    names = tuple(f"class {i}" for i in range(100))
    found = header(class_names=names).facts()
    assert mismatches(found, found, ("A", "B")) == []
    wanted = {"codec sha256": "cd", "resolution": 8, "class_names": names[:99], "unknown": 1}
    first, second = mismatches(found, wanted, ("A", "B"))
    assert first == "codec sha256 is ab in A and cd in B"
    assert "(100 of them) in A" in second
    assert len(second) < 250


def test_the_table_of_sizes_in_the_documentation():
    """docs/latents.md: GiB of ImageNet by resolution and dtype."""
    text = (Path(__file__).resolve().parents[2] / "docs/latents.md").read_text()
    for side in (256, 512):
        sizes = [
            1_281_167 * item_bytes((4, side // 8, side // 8), flip=True, deterministic=False, dtype=dtype) / 2**30
            for dtype in ("float32", "bfloat16")
        ]
        row = f"| {side} | {sizes[0]:.1f} | {sizes[1]:.1f} |"
        assert row in text, row
        assert all(math.isfinite(s) for s in sizes)
