"""`python -m dsmoe checkpoints RUN`: what a run has saved, whether it is whole, fewer of it, weights out of it."""

import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch

from dsmoe.base.errors import CheckpointError, choose_from
from dsmoe.base.plan import Plan
from dsmoe.base.run_folder import RunFolder
from dsmoe.checkpoint.reader import Reader, read_state
from dsmoe.checkpoint.store import Store
from dsmoe.checkpoint.weights import MODEL, stream_weights


def open_store(run: str) -> Store:
    """The checkpoints of a run folder; CheckpointError when it is none."""
    folder = RunFolder(Path(run)).checkpoints
    if not folder.is_dir():
        raise CheckpointError(f"{run} is not a run folder (it has no {folder.name}/); give one such as runs/NAME.")
    return Store(folder)


def listing(store: Store, verify: bool) -> Iterator[tuple[str, str]]:
    """(name, facts) of every committed checkpoint, newest first; reads every byte with `verify`.

    CheckpointError at the end when some are damaged.
    """
    found, damaged = store.committed(), 0
    for images_seen in found:
        fault = store.damage(images_seen) if verify else ""
        damaged += bool(fault)
        yield store.path(images_seen).name, f"DAMAGED: {fault}" if fault else _facts(store, images_seen, verify)
    if damaged:
        raise CheckpointError(f"{damaged} of {len(found)} checkpoints in {store.root} are damaged; see above.")


def _facts(store: Store, images_seen: int, verified: bool) -> str:
    try:
        state = read_state(store.path(images_seen))
    except CheckpointError as error:
        return f"DAMAGED: {error}"
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(store.path(images_seen).stat().st_mtime))
    size = f"{store.size(images_seen) / 2**20:,.1f} MiB"
    whole = ", whole" if verified else ""
    return f"step {state['steps']:,}, {images_seen:,} images, {state['ranks']} ranks, {size}, {written}{whole}"


def prune(store: Store, keep: int) -> list[str]:
    """Delete what is older than the newest `keep` whole checkpoints; the names deleted, none when fewer are whole."""
    if keep < 1:
        raise CheckpointError(f"--prune is {keep}; keep at least 1.")
    found, whole = store.committed(), []
    for images_seen in found:
        if not store.damage(images_seen):
            whole.append(images_seen)
        if len(whole) == keep:
            break
    gone = [n for n in found if len(whole) == keep and n < whole[-1]]
    for images_seen in gone:
        store.remove(images_seen)
    return [store.path(n).name for n in gone]


def export(store: Store, file: str, kind: str, at: int | None = None) -> str:
    """Write a checkpoint's weights of a kind to `file`: of the one `at` images seen, or the newest whole one.

    kind: `model`, or the name of an average that the run keeps. Returns one line about it.
    """
    path = Path(file)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"--export is {file!r}; give a name that ends in .safetensors.")
    found = store.committed()
    if at is not None and at not in found:
        raise CheckpointError(
            f"--at is {at} and {store.root} has none of that; choose from {', '.join(map(str, found))}."
        )
    images_seen = next((n for n in found if at in (None, n) and not store.damage(n)), None)
    if images_seen is None:
        raise CheckpointError(f"{store.root} holds no whole checkpoint; nothing to export.")
    reader = Reader(store.path(images_seen))
    plan = Plan.from_dict(reader.state["plan"])
    kinds = (*plan.recipe.ema_decays, MODEL)
    if kind not in kinds:
        raise CheckpointError(choose_from("--kind", kind, kinds))
    buffers = {name: torch.tensor(values) for name, values in reader.state.get("buffers", {}).items()}
    shapes = reader.shapes | {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    parameters = ((name, reader.whole(name, "master" if kind == MODEL else kind)) for name in reader.shapes)
    try:
        stream_weights(path, shapes, chain(parameters, buffers.items()), plan, images_seen, kind)
    except OSError as error:
        raise CheckpointError(f"cannot write {file} ({error.strerror or error}); give another name.") from error
    return f"wrote {file}: {kind} weights at {images_seen:,} images"
