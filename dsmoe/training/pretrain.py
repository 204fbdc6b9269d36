"""A class-conditional pretraining run from command line to DONE: the order of things, and how a run ends.

Exit codes: 0 done; 2 the user's input was wrong (found before process groups and model exist); 1 training failed;
75 asked to stop by SIGTERM or SIGUSR1 and saved: the same command goes on.
"""

import os
import sys
import time
import traceback
from collections.abc import Generator, Mapping
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import torch

from dsmoe.base.errors import EXIT_BAD_INPUT, ConfigError, TrainingFailure, UserError
from dsmoe.base.plan import Plan, describe
from dsmoe.base.run_folder import Lease, RunFolder, rejected_run_folder
from dsmoe.checkpoint.saver import Saver
from dsmoe.checkpoint.store import Store
from dsmoe.checkpoint.weights import MODEL, new_model
from dsmoe.data.dataset import FaultReporter, ImageDataset
from dsmoe.data.latent_cache import LatentCache
from dsmoe.data.loader import Batch, BatchLoader
from dsmoe.data.order import BatchLayout, SampleOrder
from dsmoe.diffusion import make_objective
from dsmoe.ds_config import engine_config
from dsmoe.preprocess.disk import DiskLatents
from dsmoe.preprocess.memory import LatentBatch, MemoryLatents, Sharing, encode_dataset
from dsmoe.runtime import distributed, logging
from dsmoe.runtime.distributed import LaunchPlace
from dsmoe.runtime.stopping import EXIT_STOPPED, StopRequest
from dsmoe.tasks.class_conditional import ClassConditional
from dsmoe.training import state
from dsmoe.training.checkpoints import Checkpoints, Stopped, open_newest
from dsmoe.training.deepspeed_patches import skip_shm_op
from dsmoe.training.ema import Ema
from dsmoe.training.engine import Engine, build_engine
from dsmoe.training.health import GradientWatch
from dsmoe.training.loop import Training, train
from dsmoe.training.optimizer import build_optimizer, choose_implementation
from dsmoe.training.prepare import Command, Prepared, one_line, parse_command, prepare
from dsmoe.training.sampling import SampleSheets, export_weights
from dsmoe.training.telemetry import Telemetry, draw_losses, read_metrics

EXIT_FAILED = 1
# Launchers end all ranks as soon as one has ended, so the others give rank 0 this long to say why.
PATIENCE_SECONDS = 5.0


def main(argv: list[str], description: str, environ: Mapping[str, str] = os.environ) -> int:
    """Run the command on this process; returns its exit code."""
    place: LaunchPlace | None = None
    command: Command | None = None
    try:
        place = distributed.discover(environ)
        logging.configure(place.rank)
        command = parse_command(argv, description)
        prepared = prepare(command, place)
    except UserError as error:
        return refuse(error, place or environ, command)
    except OSError as error:  # a path too long or not ours to look at; each room reports what it expects by itself
        reason = f"cannot use {error.filename!r}: {error.strerror}; give another path or name."
        return refuse(ConfigError(reason if error.filename else str(error)), place or environ, command)
    if command.plan_only:
        if place.rank == 0:
            print(describe(prepared.plan))
        return 0
    if prepared.folder.done.exists():
        logging.get_logger().info("%s is DONE; nothing to do. Samples and weights lie there.", prepared.folder.path)
        return 0
    return run(prepared, place)


def refuse(error: UserError, place: LaunchPlace | Mapping[str, str], command: Command | None) -> int:
    """Rank 0 prints the line and leaves it in FAILED; every rank returns the bad-input code.

    place: or the environment, when that is what was refused.
    """
    rank = place.rank if isinstance(place, LaunchPlace) else distributed.stated_rank(place)
    if rank == 0:
        line = one_line(error)
        print(line, file=sys.stderr, flush=True)
        recipe = command.recipe if command else "command"
        rejected_run_folder(command.run if command else None, recipe).record_failure(line)
    else:
        time.sleep(PATIENCE_SECONDS)
    return EXIT_BAD_INPUT


def run(prepared: Prepared, place: LaunchPlace) -> int:
    """Train a prepared plan. Whatever goes wrong is recorded in FAILED by the rank that met it."""
    folder, lease = prepared.folder, None
    try:
        distributed.initialize(place, prepared.device, timedelta(minutes=prepared.policy.block.timeout_minutes))
        skip_shm_op()
        lease = _shared_lease(_open_folder(prepared), folder)
        logging.attach_run_folder(folder.path, place.rank)
        _announce(prepared.plan, folder)
        with StopRequest() as stop:
            _run_all(prepared, lease, stop)
    except Stopped:
        logging.get_logger().info("stopped as asked; the same command goes on from %s", folder.checkpoints)
        distributed.shutdown()
        return EXIT_STOPPED
    except UserError as error:
        return _failed(folder, lease, one_line(error), EXIT_BAD_INPUT)
    except TrainingFailure as error:
        return _failed(folder, lease, f"dsmoe: {error}", EXIT_FAILED)
    except Exception as error:
        logging.get_logger().error("%s", traceback.format_exc())
        return _failed(folder, lease, f"dsmoe: {type(error).__name__}: {error}".splitlines()[0], EXIT_FAILED)
    distributed.shutdown()
    return 0


def _failed(folder: RunFolder, lease: Lease | None, line: str, code: int) -> int:
    """The first rank's line stays in FAILED; a job that was taken over leaves the folder alone."""
    logging.get_logger().error("%s", line)
    if lease is None or lease.is_current():
        folder.record_failure(line, replace=lease is None)
    distributed.shutdown(failed=True)
    return code


@distributed.on_main
def _open_folder(prepared: Prepared) -> Lease:
    return prepared.folder.create(prepared.plan)


def _shared_lease(lease: Lease | None, folder: RunFolder) -> Lease:
    """Rank 0's lease on every rank; returns once rank 0 has made the folder."""
    return Lease(folder, *distributed.broadcast_object(lease and [lease.generation, lease.holder]))


@distributed.on_main
def _announce(plan: Plan, folder: RunFolder) -> None:
    for line in describe(plan).splitlines():
        logging.get_logger("plan").info("%s", line)
    logging.get_logger().info("run folder %s", folder.path)


def _run_all(prepared: Prepared, lease: Lease, stop: StopRequest) -> None:
    plan, device = prepared.plan, prepared.device.torch_device
    recipe, store = plan.recipe, Store(prepared.folder.checkpoints)
    saved = open_newest(store)
    start = saved.state["steps"] if saved else 0
    prepared.codec.to(device)
    batches = _batches(prepared, device, start)
    engine = _engine(prepared, device)
    ema = Ema(engine, recipe.ema_decays)
    if saved:
        state.load(engine, ema, saved)
        if distributed.is_main():
            logging.get_logger().info("resumed at %s images from %s", f"{saved.state['images_seen']:,}", saved.folder)
    telemetry = Telemetry(
        plan,
        lease,
        prepared.folder.path,
        prepared.device,
        engine.dtype,
        start * recipe.train.global_batch,
        saved.state["telemetry"] if saved else None,
    )
    saver = Saver(store, lease, recipe.checkpoint.keep, recipe.checkpoint.keep_every)
    training = Training(
        plan=plan,
        engine=engine,
        ema=ema,
        batches=batches,
        codec=prepared.codec,
        objective=make_objective(recipe.diffusion).to(device),
        task=ClassConditional(
            num_classes=plan.model.num_classes,
            label_dropout=recipe.train.label_dropout,
            seed=recipe.train.seed,
            diffusion=recipe.diffusion,
        ),
        watch=GradientWatch(engine.model.x_embedder, device),
        telemetry=telemetry,
        sheets=SampleSheets(plan, prepared.codec, prepared.folder.samples, prepared.device),
        device=device,
        checkpoints=Checkpoints(plan, saver, stop, engine, ema, telemetry),
        start_step=start,
    )
    with closing(batches):
        train(training)
    _report_damage(prepared.dataset)
    _finish(prepared, training, lease)


def _batches(prepared: Prepared, device: torch.device, start: int) -> Generator[Batch | LatentBatch, None, None]:
    """This rank's micro-batches from step `start` on, from images or from latents encoded once."""
    plan, policy = prepared.plan, prepared.policy
    recipe, rank, world = plan.recipe, distributed.rank(), distributed.world_size()
    layout = BatchLayout(
        global_batch=prepared.batch.global_batch,
        micro_batch=prepared.batch.micro_batch,
        world_size=world,
        rank=rank,
    )
    order = SampleOrder(
        recipe.train.seed, plan.data.items, block=recipe.data.shuffle_block, global_batch=recipe.train.global_batch
    )
    span = {"start_step": start, "num_steps": recipe.train.steps - start, "flip": recipe.data.flip}
    if recipe.codec.cache == "memory":
        return _encode(prepared, device).micro_batches(order, layout, **span)
    if isinstance(prepared.dataset, LatentCache):
        return DiskLatents(prepared.dataset, pin_memory=device.type == "cuda").micro_batches(order, layout, **span)
    loader = BatchLoader(
        prepared.dataset,
        order,
        layout,
        workers=policy.block.data_workers,
        pin_memory=device.type == "cuda",
        **span,
    )
    return iter(loader)


def _encode(prepared: Prepared, device: torch.device) -> MemoryLatents:
    recipe = prepared.plan.recipe
    world = distributed.world_size()
    share = -(-len(prepared.dataset) // world)
    progress = logging.Progress("encoding into memory (this rank's share)", share, "images")
    store = encode_dataset(
        prepared.dataset,
        prepared.codec,
        resolution=recipe.data.resolution,
        flip=recipe.data.flip,
        device=device,
        workers=prepared.policy.block.data_workers,
        sharing=Sharing(
            rank=distributed.rank(),
            world_size=world,
            exchange=lambda t: torch.cat(distributed.all_gather_tensor(t)),
        ),
        progress=lambda p: progress.update(p.done - progress.done),
    )
    progress.finish()
    return store


def _engine(prepared: Prepared, device: torch.device) -> Engine:
    """Model and engine. Every rank draws the same initial weights, so nothing depends on who broadcasts."""
    plan, policy = prepared.plan, prepared.policy
    torch.manual_seed(plan.recipe.train.seed)
    implementation = choose_implementation(
        policy.block.optimizer, device_type=device.type, offload=policy.offload_optimizer
    )
    return build_engine(
        plan,
        lambda layer: new_model(plan, moe_cls=layer),
        lambda parameters: build_optimizer(parameters, plan.recipe.optimizer, implementation),
        engine_config(policy, prepared.batch, plan.recipe.optimizer),
        device,
    )


def _report_damage(dataset: ImageDataset | LatentCache) -> None:
    """Say how many files were skipped on all ranks together, and the first names."""
    if isinstance(dataset, LatentCache):
        names = dataset.damaged
        if names and distributed.is_main():
            line = "stand-ins for %d damaged images in the cache, the first: %s"
            logging.get_logger("data").warning(line, len(names), ", ".join(names[:5]))
    if not isinstance(dataset, FaultReporter):
        return
    met = torch.zeros(len(dataset), dtype=torch.uint8)
    met[[fault.item for fault in dataset.faults]] = 1
    items = distributed.all_reduce_(met, "max").nonzero().flatten().tolist()
    if items and distributed.is_main():
        first = ", ".join(dataset.name(i) for i in items[:5])
        logging.get_logger("data").warning("skipped %d damaged images, the first: %s", len(items), first)


def _finish(prepared: Prepared, training: Training, lease: Lease) -> None:
    """Export weights, draw the last sheet and the loss plot, mark the run DONE, say what to do next."""
    plan, folder = prepared.plan, prepared.folder
    seen = plan.recipe.train.steps * plan.recipe.train.global_batch
    for kind in (MODEL, *training.ema.averages):
        _verify(lease)
        export_weights(folder.checkpoints / f"{kind}.safetensors", plan, training.engine, training.ema, kind, seen)
    sheet = training.sheets.draw(training.engine, training.ema, seen)
    training.telemetry.close()
    _close(plan, folder, lease, sheet, training.telemetry.elapsed)


@distributed.on_main
def _verify(lease: Lease) -> None:
    lease.verify()


@distributed.on_main
def _close(plan: Plan, folder: RunFolder, lease: Lease, sheet: Path | None, seconds: float) -> None:
    lease.verify()
    records = read_metrics(folder.metrics)
    draw_losses(records, folder.path / "loss.png", plan.recipe.name)
    last = records[-1]
    folder.record_done(
        {"images_seen": last["images_seen"], "loss": last["loss"], "training_seconds": round(seconds, 1)}
    )
    weights, *others = (folder.checkpoints / f"{kind}.safetensors" for kind in (*plan.recipe.ema_decays, MODEL))
    routing = [f"routing      python -m dsmoe routing {folder.path}"] * plan.recipe.model.is_moe
    for line in (
        f"done: {last['images_seen']:,} images in {seconds:.0f} s, loss {last['loss']:.4f}",
        f"samples      {sheet or 'none: the whole model does not fit a rank'}",
        f"loss plot    {folder.path / 'loss.png'}",
        f"metrics      {folder.metrics}  (TensorBoard: tensorboard --logdir {folder.tensorboard})",
        *routing,
        f"weights      {weights}  (averaged), {', '.join(map(str, others))}",
        f"next         python launchers/sample.py --checkpoint {weights} --classes all",
    ):
        logging.get_logger().info("%s", line)
