"""Training from a latent cache: whether it is the cache of this run, and its micro-batches. Not here: building one."""

import os
import re
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from dsmoe.base.errors import ConfigError
from dsmoe.base.recipe import Recipe
from dsmoe.codec.protocol import Codec, Posterior
from dsmoe.data.dataset import ImageDataset, build_dataset
from dsmoe.data.latent_cache import CROP, LatentCache, mismatches
from dsmoe.data.order import BatchLayout, SampleOrder, requests
from dsmoe.preprocess.memory import LatentBatch

AHEAD = 4  # micro-batches that are read while the device computes


def training_images(recipe: Recipe) -> ImageDataset:
    """The images of a recipe's `data` section; DataError when they cannot be used."""
    data = recipe.data
    return build_dataset(
        data.source,
        path=data.path,
        resolution=data.resolution,
        size=data.size,
        split="train",
        max_bad_fraction=data.max_bad_fraction,
        label_map=data.label_map,
        index_folder=data.index_folder,
    )


def images_are_here(recipe: Recipe) -> bool:
    """Whether this machine has what data.path names; of a pattern of files, its folder."""
    if recipe.data.path is None:
        return True
    plain = re.split(r"[*?\[{]", recipe.data.path)[0]
    path = Path(recipe.data.path if plain == recipe.data.path else os.path.dirname(plain) or ".")
    return path.expanduser().exists()


def open_cache(recipe: Recipe, codec: Codec, images: ImageDataset | None, build_command: str) -> LatentCache:
    """The cache that the recipe names, when it holds the latents that the run would make itself.

    images: the source, None where it is not on this machine; then names and labels come from the cache alone.
    build_command: the line that builds it, for messages. DataError when it is missing or damaged, ConfigError when it
    is of something else, with both sides named.
    """
    cache = LatentCache(recipe.codec.cache_path, build_command)
    wanted = {f"codec {name}": value for name, value in codec.provenance.items()}
    wanted |= {"resolution": recipe.data.resolution, "crop": CROP, "dtype": recipe.codec.cache_dtype}
    wanted |= {"source": recipe.data.source}
    if images is not None:
        wanted |= {"items": len(images), "fingerprint": images.fingerprint}
        wanted |= {"class_names": tuple(images.class_names)}
    found = cache.header.facts()
    wrong = mismatches(found, wanted, ("the cache", "the recipe"))
    if recipe.data.flip and not cache.header.flip:
        wrong.append("views are plain only in the cache and plain and mirrored in the recipe (data.flip)")
    if wrong:
        raise ConfigError(
            f"latent cache {cache.folder} is of something else: {'; '.join(wrong)}. Give another codec.cache_path, or "
            f"build one: {build_command}."
        )
    return cache


class DiskLatents:
    """Micro-batches of a latent cache, in the order of training.

    pin_memory: batches lie in page-locked memory.
    """

    def __init__(self, cache: LatentCache, *, pin_memory: bool = False) -> None:
        self._cache, self._pin_memory = cache, pin_memory

    def micro_batches(
        self,
        order: SampleOrder,
        layout: BatchLayout,
        *,
        start_step: int = 0,
        num_steps: int,
        flip: bool = False,
    ) -> Generator[LatentBatch, None, None]:
        """The same micro-batches, in the same order, as a `BatchLoader` with these arguments.

        A background thread reads them ahead, so that a step does not wait for the disk. Close the generator when not
        all of it is taken.
        """
        assert order.num_items == len(self._cache), (order.num_items, len(self._cache))
        wanted = requests(order, layout, start_step=start_step, num_steps=num_steps, flip=flip)
        return _ahead(self._batch(want.index, want.items, want.flips) for want in wanted)

    def _batch(self, index: Tensor, items: Tensor, flips: Tensor) -> LatentBatch:
        moments, labels = self._cache.read(items, flips)
        mean = moments[:, 0]
        std = torch.zeros_like(mean) if self._cache.header.deterministic else moments[:, 1]
        batch = LatentBatch(Posterior(mean, std), labels, index, items)
        return batch.pin_memory() if self._pin_memory else batch


def _ahead(batches: Iterator[LatentBatch]) -> Generator[LatentBatch, None, None]:
    """The same values, made by one background thread a few early; what it raises is raised here."""
    end = object()
    with closing(batches), ThreadPoolExecutor(1, "latents") as thread:
        coming = deque(thread.submit(next, batches, end) for _ in range(AHEAD))
        while (batch := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, batches, end))
            yield batch
