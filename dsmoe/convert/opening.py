"""What lies at a path, by its content: a torch file, safetensors, a diffusers or DeepSpeed folder, a run of ours.

Gives named tensors and what came with them; which model they are is `recognise`'s question.
"""

import argparse
import dataclasses
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dsmoe.base.errors import CheckpointError, choose_from
from dsmoe.base.plan import Plan
from dsmoe.base.recipe import EMA
from dsmoe.base.run_folder import RunFolder
from dsmoe.checkpoint.manifest import STATE_FILE
from dsmoe.checkpoint.reader import Reader
from dsmoe.checkpoint.store import Store
from dsmoe.checkpoint.weights import MODEL
from dsmoe.convert import diffusers
from dsmoe.convert.deepspeed_folder import deepspeed_source, find_step
from dsmoe.convert.pickled import Inert, load, pickled_source
from dsmoe.convert.source import Read, Source, meta, safetensors_source, shards_of

INDEX_SUFFIX = ".safetensors.index.json"
_PREFIXES = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name


@dataclass(frozen=True, kw_only=True)
class Opened:
    """tensors: of the chosen kind, as named at `path`. container: what it is, in words. kind: model, ema, ...

    plan: ours. arguments: of the training script, where the file keeps them. config, labels: of a diffusers folder.
    """

    path: Path
    container: str
    tensors: Source
    kind: str = MODEL
    plan: Plan | None = None
    images_seen: int = 0
    arguments: Mapping[str, object] = field(default_factory=dict)
    config: Mapping[str, object] | None = None
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def open_weights(path: Path, kind: str | None, *, trust_pickle: bool) -> Opened:
    """The weights at a path; CheckpointError in one line when there are none, or two things at once.

    kind: which of several weights that lie there (model, or an average's name); None: the average, if there is one.
    trust_pickle: as `inert` of pickled.load.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"checkpoint {path} does not exist; give a file or folder that does.")
        opened = _folder(path, kind, trust_pickle) if path.is_dir() else _file(path, kind, trust_pickle)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error.strerror or error}); give another.") from error
    return _without_prefixes(opened)


def _without_prefixes(opened: Opened) -> Opened:
    for prefix in _PREFIXES:
        names = list(opened.tensors)
        if names and all(name.startswith(prefix) for name in names):
            tensors = opened.tensors.renamed({name.removeprefix(prefix): name for name in names})
            note = f"every name began with {prefix!r}, which was taken off"
            opened = dataclasses.replace(opened, tensors=tensors, notes=(*opened.notes, note))
    return opened


def _folder(path: Path, kind: str | None, trust_pickle: bool) -> Opened:
    step = find_step(path)
    model = next((p for p in (path, path / "transformer") if (p / diffusers.CONFIG_FILE).is_file()), None)
    ours = RunFolder(path).plan.is_file() or any(path.glob("ckpt/*.safetensors")) or bool(_store(path).committed())
    indices = sorted(p for p in path.glob(f"*{INDEX_SUFFIX}") if model is None)
    found = {
        "a checkpoint of dsmoe": (path / STATE_FILE).is_file(),
        "a run folder of dsmoe": ours,
        "a DeepSpeed checkpoint": step is not None,
        "a diffusers model": model is not None,
        "a sharded model": len(indices) == 1,
    }
    kinds = [name for name, there in found.items() if there]
    if len(kinds) > 1:
        raise CheckpointError(f"folder {path} is {' and '.join(kinds)} at once; give the file or folder inside it.")
    if not kinds:
        raise CheckpointError(
            f"folder {path} holds no weights: neither a run or checkpoint of dsmoe (ckpt/, {STATE_FILE}), nor a "
            f"DeepSpeed checkpoint (latest, *_model_states.pt), nor a diffusers model ({diffusers.CONFIG_FILE}). "
            "Give a file, or the folder that holds them."
        )
    if found["a checkpoint of dsmoe"]:
        return _checkpoint(path, kind)
    if ours:
        return _run(path, kind)
    if step is not None:
        _only_kind(path, kind, (MODEL,))
        tensors, samples, about = deepspeed_source(step, inert=trust_pickle)
        return Opened(path=step, container=f"DeepSpeed checkpoint, {about}", tensors=tensors, images_seen=samples)
    if model is not None:
        return _diffusers(path, model, kind, trust_pickle)
    return _safetensors(indices[0], shards_of(indices[0]), kind)


def _only_kind(path: Path, kind: str | None, kinds: tuple[str, ...]) -> None:
    if kind not in (None, *kinds):
        raise CheckpointError(f"{path}: {choose_from('--kind', kind, kinds)}")


def _store(run: Path) -> Store:
    return Store(RunFolder(run).checkpoints)


def _run(path: Path, kind: str | None) -> Opened:
    """A run folder: its finished weights, else those of its newest whole checkpoint."""
    file = RunFolder(path).checkpoints / f"{kind or EMA}.safetensors"
    if file.is_file():
        return _file(file, kind, False)
    store = _store(path)
    newest = next((n for n in store.committed() if not store.damage(n)), None)
    if newest is None:
        raise CheckpointError(f"run folder {path} holds neither {file.name} nor a whole checkpoint; train it first.")
    return _checkpoint(store.path(newest), kind)


def _checkpoint(path: Path, kind: str | None) -> Opened:
    """A resumable checkpoint of ours, all of whose bytes are as written."""
    reader = Reader(path)
    images_seen = reader.state["images_seen"]
    store = Store(path.parent)
    fault = store.damage(images_seen) if store.path(images_seen) == path else ""
    if fault:
        raise CheckpointError(f"checkpoint {path} is damaged: {fault}; take another.")
    plan = Plan.from_dict(reader.state["plan"])
    kind = kind or next(iter(plan.recipe.ema_decays))
    _only_kind(path, kind, (*plan.recipe.ema_decays, MODEL))
    state = "master" if kind == MODEL else kind
    buffers = {name: torch.tensor(values) for name, values in reader.state.get("buffers", {}).items()}
    outline = {name: meta(shape, torch.float32) for name, shape in reader.shapes.items()}
    outline |= {name: meta(tuple(buffer.shape), buffer.dtype) for name, buffer in buffers.items()}

    def open_reader() -> Read:
        fresh = Reader(path)
        return lambda name: buffers[name] if name in buffers else fresh.whole(name, state)

    return Opened(
        path=path,
        container=f"resumable checkpoint of dsmoe, {reader.state['ranks']} ranks",
        tensors=Source(outline, open_reader),
        kind=kind,
        plan=plan,
        images_seen=images_seen,
    )


def _diffusers(path: Path, model: Path, kind: str | None, trust_pickle: bool) -> Opened:
    config = diffusers.read_config(model / diffusers.CONFIG_FILE)
    _only_kind(path, kind, (MODEL,))
    file, index = model / diffusers.WEIGHTS_FILE, model / f"{diffusers.WEIGHTS_FILE}.index.json"
    old = file.with_suffix(".bin")
    if file.is_file() or index.is_file():
        shards = [file] if file.is_file() else shards_of(index)
        tensors, _ = safetensors_source(shards)
        container = f"diffusers model, {len(shards)} safetensors file{'s' * (len(shards) > 1)}"
    elif old.is_file():
        tensors, container = pickled_source(old, (), inert=trust_pickle), "diffusers model, a torch file"
    else:
        raise CheckpointError(f"{model} holds a {diffusers.CONFIG_FILE} but no {file.name}; fetch the weights, too.")
    labels = _pipeline_labels(path / "model_index.json", int(config.get("num_embeds_ada_norm") or 0))
    return Opened(path=model, container=container, tensors=tensors, config=config, labels=labels)


def _pipeline_labels(index: Path, count: int) -> tuple[str, ...] | None:
    """Names of the classes in a DiT pipeline's model_index.json; None when it has none, or not for every class."""
    try:
        names = json.loads(index.read_text(encoding="utf-8")).get("id2label")
        return tuple(str(names[str(i)]).split(",")[0] for i in range(count)) or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _file(path: Path, kind: str | None, trust_pickle: bool) -> Opened:
    with open(path, "rb") as file:
        start = file.read(9)
    if zipfile.is_zipfile(path) or start[:1] == b"\x80":
        return _pickled(path, kind, trust_pickle)
    if start[8:] == b"{":
        return _safetensors(path, [path], kind)
    if start[:1] == b"{" and path.name.endswith(INDEX_SUFFIX):
        return _safetensors(path, shards_of(path), kind)
    raise CheckpointError(f"{path} is neither a torch file nor safetensors; give the file that holds the weights.")


def _safetensors(path: Path, files: list[Path], kind: str | None) -> Opened:
    tensors, metadata = safetensors_source(files)
    container = f"{len(files)} safetensors files" if len(files) > 1 else "safetensors file"
    if "dsmoe_plan" not in metadata:
        _only_kind(path, kind, (MODEL,))
        return Opened(path=path, container=container, tensors=tensors)
    try:
        plan, images, own = json.loads(metadata["dsmoe_plan"]), int(metadata["images_seen"]), metadata["kind"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path} carries a plan that cannot be read ({error}).") from error
    _only_kind(path, kind, (own,))
    return Opened(
        path=path,
        container=f"{container} of dsmoe",
        tensors=tensors,
        kind=own,
        plan=Plan.from_dict(plan),
        images_seen=images,
    )


def _pickled(path: Path, kind: str | None, trust_pickle: bool) -> Opened:
    tree = load(path, inert=trust_pickle)
    if not isinstance(tree, Mapping) or not tree:
        raise CheckpointError(f"{path} holds {type(tree).__name__}, not named tensors.")
    notes = () if zipfile.is_zipfile(path) else ("an old torch file, which cannot be memory-mapped: read whole",)
    if _is_state(tree):
        _only_kind(path, kind, (MODEL,))
        return Opened(path=path, container="torch file, flat", tensors=pickled_source(path, ()), notes=notes)
    sections = [str(key) for key, value in tree.items() if _is_state(value)]
    if not sections:
        raise CheckpointError(f"{path} holds {', '.join(map(str, list(tree)[:6]))}, and no named tensors among them.")
    chosen = kind if kind is not None else next((s for s in (EMA, MODEL) if s in sections), None)
    if chosen is None and len(sections) == 1:
        chosen = sections[0]
    if chosen not in sections:
        raise CheckpointError(f"{path}: {choose_from('--kind', chosen, sections)}")
    others = [str(key) for key in tree if key != chosen]
    arguments = tree.get("args")
    return Opened(
        path=path,
        container=f"torch file, its {chosen!r}",
        tensors=pickled_source(path, (chosen,), inert=trust_pickle),
        kind=chosen,
        # Another library in this process may have told torch that a Namespace is safe: then it is read as itself.
        arguments=vars(arguments) if isinstance(arguments, Inert | argparse.Namespace) else {},
        notes=(*notes, f"left out: {', '.join(others)}") if others else notes,
    )


def _is_state(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())
