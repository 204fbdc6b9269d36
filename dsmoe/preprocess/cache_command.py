"""`launchers/cache_latents.py`: from its command line to a complete latent cache, and `--verify`.

Exit codes: 0 complete; 2 the user's input was wrong, or a cache is damaged; 1 anything else; 75 asked to stop by
SIGTERM or SIGUSR1: the same command goes on.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from dsmoe.base.command_line import Parser
from dsmoe.base.errors import ConfigError, DataError, TrainingFailure, UserError
from dsmoe.base.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from dsmoe.base.sealed import difference
from dsmoe.codec import build as build_codec
from dsmoe.codec.protocol import Codec
from dsmoe.data.dataset import ImageDataset
from dsmoe.data.latent_cache import DTYPES, CacheHeader, item_bytes, items_a_shard, read_manifest
from dsmoe.preprocess.cache_build import POLL_SECONDS, Job, build
from dsmoe.preprocess.cache_folder import CacheFolder
from dsmoe.preprocess.disk import training_images
from dsmoe.runtime import distributed
from dsmoe.runtime.device import Device
from dsmoe.runtime.logging import get_logger
from dsmoe.runtime.stopping import EXIT_STOPPED, StopRequest

SHARD_MIB = 1024.0
GPU_WORKERS = 8
# Launchers end all ranks as soon as one has ended, so the others give rank 0 this long to say why.
PATIENCE_SECONDS = 5.0


class _Parser(Parser):
    """key=value may stand before, between and after the options."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: object = None) -> argparse.Namespace:
        return self.parse_intermixed_args(args, namespace)


def parser(description: str) -> Parser:
    """The command's arguments."""
    own = _Parser(description)
    own.add_argument("--out", metavar="DIR", help="folder of the cache, new or begun by the same command")
    own.add_argument(
        "--recipe", default=DEFAULT_RECIPE, metavar="NAME|FILE", help="whose data and codec sections are taken"
    )
    own.add_argument(
        "--dtype",
        default="float32",
        metavar="|".join(DTYPES),
        help="of the latents (default float32, which trains the same run as images)",
    )
    own.add_argument("--shard-mib", type=float, default=SHARD_MIB, metavar="N", help="MiB a file (default 1024)")
    own.add_argument(
        "--workers", type=int, metavar="N", help=f"loader processes a rank (default {GPU_WORKERS} on a GPU, 0 on a CPU)"
    )
    own.add_argument("--verify", metavar="DIR", help="read every byte of a complete cache and name what is damaged")
    own.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields, such as data.path=FOLDER")
    return own


def work(options: argparse.Namespace, device: Device) -> int:
    """Build or verify on this rank; the exit code."""
    try:
        return _work(options, device)
    except UserError:
        if not distributed.is_main():
            time.sleep(PATIENCE_SECONDS)
        raise


def _work(options: argparse.Namespace, device: Device) -> int:
    if options.verify is not None:
        if options.out is not None or options.overrides:
            raise ConfigError("--verify takes a folder and nothing else; leave out --out and key=value.")
        return verify(Path(options.verify))
    if options.out is None:
        raise ConfigError("--out is missing; give the folder of the cache, or --verify DIR.")
    if options.workers is not None and options.workers < 0:
        raise ConfigError(f"--workers is {options.workers}; it must be 0 or more.")
    recipe = load_recipe(options.recipe, options.overrides)
    codec = build_codec(recipe.codec.name, recipe.codec.path)
    dataset = training_images(recipe)
    header = plan_header(recipe, codec, dataset, options.dtype, options.shard_mib)
    folder = CacheFolder(Path(options.out), header)
    codec.to(device.torch_device)
    workers = options.workers if options.workers is not None else GPU_WORKERS * (device.kind == "cuda")
    try:
        with StopRequest() as stop:
            complete = build(
                Job(
                    folder=folder,
                    dataset=dataset,
                    codec=codec,
                    device=device.torch_device,
                    workers=workers,
                    stop=stop,
                )
            )
    except TrainingFailure as error:
        get_logger().error("dsmoe: %s", error)
        distributed.shutdown(failed=True)
        return 1
    if not complete:
        get_logger().info("stopped as asked; the same command goes on with %s", folder.path)
        return EXIT_STOPPED
    get_logger().info("train from it with codec.cache=disk codec.cache_path=%s", folder.path)
    return 0


def plan_header(recipe: Recipe, codec: Codec, dataset: ImageDataset, dtype: str, shard_mib: float) -> CacheHeader:
    """What the recipe's latents are; ConfigError when they cannot be."""
    side, multiple = recipe.data.resolution, codec.image_multiple
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}; choose from: {', '.join(DTYPES)}.")
    if not 0 < shard_mib <= 1 << 20:
        raise ConfigError(f"--shard-mib is {shard_mib:g}; it must be above 0 and at most 1048576 (1 TiB).")
    if side % multiple:
        raise ConfigError(
            f"data.resolution {side} is not a multiple of {multiple}, which codec {codec.name} needs; choose such as "
            f"{max(multiple, round(side / multiple) * multiple)}."
        )
    latent = (codec.channels, side // codec.factor, side // codec.factor)
    form = {"flip": recipe.data.flip, "deterministic": codec.deterministic, "dtype": dtype}
    return CacheHeader(
        source=recipe.data.source,
        fingerprint=dataset.fingerprint,
        items=len(dataset),
        class_names=tuple(dataset.class_names),
        resolution=side,
        codec=dict(codec.provenance),
        latent=latent,
        shard_items=items_a_shard(len(dataset), item_bytes(latent, **form), int(shard_mib * 2**20)),
        **form,
    )


def verify(folder: Path) -> int:
    """Hash every shard, shared among the ranks; DataError on all when one is damaged, with expected and found hash."""
    shards, board = read_manifest(folder)["shards"], distributed.Board("latent cache verify")
    for shard in shards[distributed.rank() :: distributed.world_size()]:
        wrong = difference(folder / shard["name"], shard)
        if wrong:
            board.post(f"wrong {board.add('wrong') - 1}", wrong)
        print(f"{shard['name']}  {f'DAMAGED: {wrong}' if wrong else 'whole'}", flush=True)
    board.add("ended")
    while board.count("ended") < distributed.world_size():
        time.sleep(POLL_SECONDS)
    if damaged := board.count("wrong"):
        raise DataError(
            f"{damaged} of {len(shards)} shards in {folder} are damaged: {board.line('wrong 0')}. Restore them, or "
            "delete those files and give the command that built them, which makes them again."
        )
    return 0
