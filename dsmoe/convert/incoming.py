"""Weights of any origin as ours: our keys, a Plan, and an account of what was done to them. Nothing is written here.

Strict: every tensor is accounted for, shapes fit the plan's model, the stored position embedding is the computed one.
"""

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsmoe.base.errors import CheckpointError, ConfigError
from dsmoe.base.plan import Plan
from dsmoe.checkpoint.weights import Weights, new_model
from dsmoe.codec import build as build_codec
from dsmoe.convert import diffusers
from dsmoe.convert.conventions import Setting, check_names, published_plan, sd_provenance, settle
from dsmoe.convert.keys import POSITION_KEY, Make, check, check_position, read_published
from dsmoe.convert.opening import Opened, open_weights
from dsmoe.convert.recognise import Given, Recognised, recognise
from dsmoe.convert.source import Source, derived
from dsmoe.data.label_map import names_of
from dsmoe.runtime.device import Device

BIAS_SUFFIX = ".moe.selection_bias"
_TO_OURS = ("stated", "objective", "preset", "heads", "top_k", "num_classes")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user says beside the path: the options of options.add_reading_options, class names already read."""

    stated: str | None = None
    kind: str | None = None
    objective: str | None = None
    preset: str | None = None
    heads: int | None = None
    top_k: int | None = None
    num_classes: int | None = None
    size: int | None = None
    codec: str | None = None
    codec_path: str | None = None
    trust_pickle: bool = False
    class_names: tuple[str, ...] | None = None

    @staticmethod
    def of(options: argparse.Namespace, class_names: tuple[str, ...] | None = None) -> "Request":
        """The request that parsed options make."""
        names = {f.name for f in dataclasses.fields(Request)} - {"class_names"}
        return Request(**{name: getattr(options, name) for name in names}, class_names=class_names)


@dataclass(frozen=True)
class Incoming:
    """opened: as found. plan, state: as ours. report: (name, text) rows on how the one became the other."""

    opened: Opened
    plan: Plan
    state: Source
    report: tuple[tuple[str, str], ...]

    @property
    def biases(self) -> list[str]:
        """Names of the selection biases among the weights."""
        return [name for name in self.state if name.endswith(BIAS_SUFFIX)]


def take_in(path: Path, request: Request) -> Incoming:
    """Recognise what lies at `path` and check it; UserError in one line when it is unknown or does not fit."""
    check_names(request.stated, request.objective)
    opened = open_weights(path, request.kind, trust_pickle=request.trust_pickle)
    if opened.plan is not None:
        return _ours(opened, opened.plan, request)
    given = Given(preset=request.preset, heads=request.heads, top_k=request.top_k, num_classes=request.num_classes)
    found = recognise(opened.tensors.outline, given, opened.config)
    convention = settle(found, opened.arguments, request.stated, request.objective)
    make = partial(_readers(found), spec=found.spec)
    state = derived(make, opened.tensors)
    _check_values(opened.tensors, found)
    plan = published_plan(found, convention, _setting(opened, found, request))
    _check_fits(state, plan)
    rows = [
        ("format", f"{convention.format.title}: {convention.why}"),
        ("container", opened.container),
        *_changes(opened, found, state),
        ("position embedding", _position_row(found, plan, request)),
        *(("note", note) for note in (*opened.notes, *found.notes)),
    ]
    return Incoming(opened, plan, state, tuple(rows))


def read(path: Path, options: argparse.Namespace) -> tuple[Path, Weights]:
    """Weights of any origin for a model on this machine, with the path they lie at, under the options of
    options.add_reading_options; CheckpointError when this host could not hold them twice."""
    names = names_of(options.label_map) if options.label_map is not None else None
    incoming = take_in(path, Request.of(options, names))
    needed = 2 * sum(t.numel() * torch.float32.itemsize for t in incoming.state.outline.values())
    have = Device("cpu").total_memory_bytes()
    if needed > have:
        raise CheckpointError(
            f"{path} needs {needed / 2**30:.1f} GiB while it is converted in memory, and this host has "
            f"{have / 2**30:.1f}; convert it first: python -m dsmoe convert {path} OUT.safetensors."
        )
    # Cloned: what a source gives may be part of a mapped file.
    state = {name: incoming.state[name].to(torch.float32, copy=True) for name in incoming.state}
    weights = Weights(state, incoming.plan, incoming.opened.images_seen, incoming.opened.kind)
    return incoming.opened.path, weights


def _readers(found: Recognised) -> Callable[..., Mapping[str, Make]]:
    if found.layout == "diffusers":
        return diffusers.read_diffusers
    if found.layout == "dsmoe":
        return _as_they_are
    return partial(read_published, attention=found.layout)


def _as_they_are(state: Mapping[str, Tensor], spec: object) -> dict[str, Make]:
    return {name: partial(state.__getitem__, name) for name in state if name != POSITION_KEY}


def _check_values(tensors: Source, found: Recognised) -> None:
    if found.layout == "diffusers":
        diffusers.check_copies(tensors, found.spec)
    if POSITION_KEY in tensors:
        check_position(tensors[POSITION_KEY], found.spec.dim)


def _check_fits(state: Source, plan: Plan) -> None:
    """Every tensor has the shape that the plan's model gives it, open sizes included."""
    with torch.device("meta"):
        wanted = new_model(plan).state_dict()
    check(state, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, "dsmoe")


def _ours(opened: Opened, plan: Plan, request: Request) -> Incoming:
    for name in _TO_OURS:
        value = getattr(request, name)
        if value is not None and (name, value) != ("stated", "dsmoe"):
            option = {"stated": "from"}.get(name, name).replace("_", "-")
            raise ConfigError(f"--{option} is {value}, but {opened.path} carries dsmoe's own plan; leave it out.")
    plan = _resized(plan, request)
    _check_fits(opened.tensors, plan)
    rows = [
        ("format", "dsmoe: it carries our plan"),
        ("container", opened.container),
        ("position embedding", _table_row(plan)),
        *(("note", note) for note in opened.notes),
    ]
    return Incoming(opened, plan, opened.tensors, tuple(rows))


def _resized(plan: Plan, request: Request) -> Plan:
    """The plan at another image side, codec or class names, where asked."""
    data, model, recipe = plan.data, plan.model, plan.recipe
    if request.class_names is not None:
        data = dataclasses.replace(data, class_names=_names(request.class_names, model.num_classes, data.class_names))
    if request.size is not None:
        side = _latent_side(request.size, int(plan.codec["factor"]), recipe.model.patch)
        model = dataclasses.replace(model, input_size=side)
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, resolution=request.size))
    if request.codec is not None or request.codec_path is not None:
        codec = dataclasses.replace(
            recipe.codec,
            name=request.codec or recipe.codec.name,
            path=request.codec_path or (recipe.codec.path if request.codec is None else None),
        )
        recipe = dataclasses.replace(recipe, codec=codec)
    return dataclasses.replace(plan, data=data, model=model, recipe=recipe)


def _latent_side(size: int, factor: int, patch: int) -> int:
    if size < 1 or size % (factor * patch):
        near = max(1, round(size / (factor * patch))) * factor * patch
        raise ConfigError(
            f"--size is {size}; it must be a multiple of {factor * patch} (codec factor {factor} x patch {patch}), "
            f"such as {near}."
        )
    return size // factor


def _setting(opened: Opened, found: Recognised, request: Request) -> Setting:
    """Codec, image side and class names of weights that came without a plan."""
    name = request.codec or "sd"
    if name == "sd" and request.codec_path is None:
        facts = sd_provenance()
    else:
        codec = build_codec(name, request.codec_path)
        facts = dict(codec.provenance)
        if codec.channels != found.channels:
            raise ConfigError(
                f"--codec {name} has latents of {codec.channels} channels, these weights of {found.channels}."
            )
    factor = int(facts["factor"])
    if request.size is None and found.input_size is None:
        raise ConfigError("these weights do not show their image side; give --size PX.")
    size = request.size if request.size is not None else found.input_size * factor
    _latent_side(size, factor, found.spec.patch)
    numbers = tuple(map(str, range(found.num_classes)))
    dtypes = Counter(t.dtype for t in opened.tensors.outline.values())
    return Setting(
        resolution=size,
        class_names=_names(request.class_names or opened.labels or (), found.num_classes, numbers),
        codec=name,
        codec_path=request.codec_path,
        codec_facts=facts,
        precision=str(dtypes.most_common(1)[0][0]).removeprefix("torch."),
        selection_bias=any(name.endswith(BIAS_SUFFIX) for name in opened.tensors),
    )


def _names(given: tuple[str, ...], count: int, rest: tuple[str, ...]) -> tuple[str, ...]:
    """Names for all classes: those given and, for labels behind them (tasks), the rest's."""
    if len(given) > count:
        raise ConfigError(f"--label-map names {len(given)} classes; these weights know {count}.")
    return (*given, *rest[len(given) :])


def _table_row(plan: Plan) -> str:
    grid = plan.model.input_size // plan.recipe.model.patch
    return f"computed for {grid} x {grid} tokens, not stored"


def _position_row(found: Recognised, plan: Plan, request: Request) -> str:
    if found.input_size is None or found.layout == "diffusers":
        return _table_row(plan)
    stored, now = found.input_size // found.spec.patch, plan.model.input_size // found.spec.patch
    text = f"the stored one, of {stored} x {stored} tokens, is the computed one"
    return text if stored == now else f"{text}; resized to {now} x {now} by computing that grid's own (--size)"


def _changes(opened: Opened, found: Recognised, state: Source) -> list[tuple[str, str]]:
    """What was renamed, packed and left out, in numbers."""
    theirs, ours = opened.tensors.outline, state.outline
    spec = found.spec
    left, packed, copies = int(POSITION_KEY in theirs), 0, 0
    if found.layout in ("timm", "flash") and spec.is_moe:
        packed = spec.depth * spec.num_experts * (3 if spec.expert_kind == "swiglu" else 4)
    if found.layout == "diffusers":
        packed, copies = spec.depth * 6, (spec.depth - 1) * 5
    kept = len(set(theirs) & set(ours))
    stacks = len(ours) - (len(theirs) - left - packed - copies)
    renamed = len(ours) - stacks - kept
    dropped = [f"{POSITION_KEY} (computed)"] * left
    if copies:
        rows = ours["y_embedder.embedding_table.weight"].shape[0]
        numbers = diffusers.embedder_copies(spec, rows)
        dropped.append(f"{copies} copies of the embedders, equal to the first ({numbers / 1e6:,.1f} M parameters)")
    return [
        ("renamed", f"{renamed} of {len(theirs)} tensors"),
        ("packed", f"{packed} tensors into {stacks}" if packed else "none"),
        ("left out", "; ".join(dropped) or "none"),
    ]
