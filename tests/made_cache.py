"""Latent caches built in this process, and what the folder must hold by an independent reading."""

import json
from pathlib import Path

import numpy as np
import torch
from made_codec import Halving
from made_images import pixels
from safetensors.numpy import load_file

from dsmoe.base.recipe import Recipe, recipe_from_dict
from dsmoe.codec.protocol import Codec
from dsmoe.data.dataset import ImageDataset
from dsmoe.data.latent_cache import LatentCache
from dsmoe.preprocess.cache_build import Job, build
from dsmoe.preprocess.cache_command import plan_header
from dsmoe.preprocess.cache_folder import CacheFolder
from dsmoe.runtime.stopping import StopRequest

SMALL_SHARD = 0.02  # MiB: one encoding batch of 8x8 images through Halving


def recipe(**changes: dict) -> Recipe:
    """A recipe of 8x8 images."""
    tree = {"name": "tiny", "model": {"depth": 1, "dim": 32, "heads": 2, "patch": 2}, "train": {"images": 256}}
    tree |= {"data": {"resolution": 8, "flip": True}, "codec": {"name": "none"}}
    return recipe_from_dict(tree | {name: {**tree.get(name, {}), **new} for name, new in changes.items()})


def job(
    folder: Path,
    dataset: ImageDataset,
    codec: Codec | None = None,
    *,
    flip: bool = True,
    dtype: str = "float32",
    stop: StopRequest | None = None,
    workers: int = 0,
) -> Job:
    """One process that builds in `folder`."""
    codec = codec or Halving()
    header = plan_header(recipe(data={"flip": flip}), codec, dataset, dtype, SMALL_SHARD)
    return Job(
        folder=CacheFolder(folder, header),
        dataset=dataset,
        codec=codec,
        device=torch.device("cpu"),
        workers=workers,
        stop=stop or StopRequest(),
    )


def made(folder: Path, dataset: ImageDataset, codec: Codec | None = None, **options: object) -> LatentCache:
    """A complete cache."""
    assert build(job(folder, dataset, codec, **options))
    return LatentCache(folder)


def content(folder: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(folder: Path) -> dict[str, np.ndarray]:
    """All shards read by the safetensors library and joined in the order that the manifest's JSON gives."""
    manifest = json.loads((folder / "manifest.json").read_text().split("\n", 1)[1])
    parts = [load_file(folder / shard["name"]) for shard in manifest["shards"]]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def truth(item: int, mirrored: bool) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std) that Halving gives for an image of Noise, float64 [3, 4, 4] by plain numpy."""
    image = pixels(item, 8, 8).astype(np.float64) / 127.5 - 1
    image = (image[:, ::-1] if mirrored else image).transpose(2, 0, 1)
    return image[:, ::2, ::2], np.abs(image[:, 1::2, 1::2])
