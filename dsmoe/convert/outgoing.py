"""Our weights into a file or folder of a published format, or of ours, one tensor at a time; whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsmoe.base.errors import CheckpointError, ConfigError, choose_from
from dsmoe.base.plan import Plan
from dsmoe.base.presets import ModelSpec
from dsmoe.checkpoint.stream import write_tensors
from dsmoe.checkpoint.weights import stream_weights
from dsmoe.convert import diffusers
from dsmoe.convert.conventions import FORMATS, OBJECTIVES
from dsmoe.convert.incoming import Incoming
from dsmoe.convert.keys import POSITION_KEY, Make, write_published
from dsmoe.convert.pickled import write_pickled
from dsmoe.convert.source import Source, derived, meta

SAFETENSORS, PICKLED = ".safetensors", (".pt", ".pth")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DIFFUSERS_RATIO = 4  # its feed-forward knows no other


def choose_target(incoming: Incoming, target: Path, stated: str | None) -> str:
    """The format to write: the stated one, or by the target's ending; ConfigError when they do not go together."""
    if os.path.lexists(target):
        raise ConfigError(f"{target} exists already; remove it or give another DST.")
    suffix = target.suffix
    if stated is None:
        if suffix == SAFETENSORS:
            stated = "dsmoe"
        elif suffix in PICKLED:
            stated = _published_form(incoming.plan)
        elif not suffix:
            stated = "diffusers"
        else:
            raise ConfigError(
                f"DST {target} ends in {suffix!r}; give .safetensors, .pt, a folder without ending, or --to."
            )
    if stated not in FORMATS:
        raise ConfigError(choose_from("--to", stated, FORMATS))
    allowed = {"dsmoe": (SAFETENSORS,), "diffusers": ("",)}.get(stated, (SAFETENSORS, *PICKLED))
    if suffix not in allowed:
        endings = " or ".join(a or "nothing (it is a folder)" for a in allowed)
        raise ConfigError(f"--to {stated} is written to a name that ends in {endings}; DST is {target}.")
    try:  # before hours of reading, not after them
        with tempfile.TemporaryFile(dir=target.parent, prefix="."):
            pass
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}); give another DST.") from error
    return stated


def _published_form(plan: Plan) -> str:
    spec = plan.recipe.model
    if spec.tasks:
        return "generalist"
    if spec.is_moe:
        return "dit-moe"
    return "sit" if plan.recipe.diffusion.is_flow else "dit"


def write(
    incoming: Incoming, target: Path, form: str, *, dtype: str | None, drop_selection_bias: bool
) -> list[tuple[str, str]]:
    """Write and return rows for the report; UserError when the weights have no such form or the disk refuses."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(choose_from("--dtype", dtype, DTYPES))
    wanted = DTYPES[dtype] if dtype else None
    rows: list[tuple[str, str]] = []
    try:
        if form == "dsmoe":
            _write_ours(incoming, target, wanted)
            return rows
        state = _without_biases(incoming, form, drop_selection_bias, rows)
        _check_form(incoming.plan, form, rows)
        tensors = _published(incoming.plan, state, form)
        facts = {name: _cast(name, tensor, wanted) for name, tensor in tensors.outline.items()}
        if form == "diffusers":
            _write_folder(target, facts, tensors, incoming.plan)
        elif target.suffix == SAFETENSORS:
            _write_safetensors(target, facts, tensors)
        else:
            write_pickled(target, facts, tensors.items())
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written ({error.strerror or error}); give another place.") from error
    return rows


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Its outline as it will be stored; the position embedding stays fp32."""
    return tensor if dtype is None or name == POSITION_KEY else meta(tuple(tensor.shape), dtype)


def _write_ours(incoming: Incoming, target: Path, dtype: torch.dtype | None) -> None:
    state, opened = incoming.state, incoming.opened
    shapes = {name: tuple(tensor.shape) for name, tensor in state.outline.items()}
    kept = set(incoming.biases)  # counted in steps of the rate: rounding would move them
    dtypes = {name: tensor.dtype if dtype is None or name in kept else dtype for name, tensor in state.outline.items()}
    stream_weights(target, shapes, state.items(), incoming.plan, opened.images_seen, opened.kind, dtypes)


def _write_safetensors(target: Path, facts: Mapping[str, Tensor], tensors: Source) -> None:
    shapes = {name: tuple(fact.shape) for name, fact in facts.items()}
    dtypes = {name: fact.dtype for name, fact in facts.items()}
    write_tensors(target, shapes, tensors.items(), {"format": "pt"}, dtypes)


def _write_folder(target: Path, facts: Mapping[str, Tensor], tensors: Source, plan: Plan) -> None:
    model = plan.model
    config = diffusers.config_of(
        plan.recipe.model,
        input_size=model.input_size,
        channels=plan.recipe.model.input_channels(model.in_channels),
        out_channels=model.in_channels * (2 if model.learn_sigma else 1),
        num_classes=model.num_classes,
    )
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        (temporary / diffusers.CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_safetensors(temporary / diffusers.WEIGHTS_FILE, facts, tensors)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _without_biases(incoming: Incoming, form: str, drop: bool, rows: list[tuple[str, str]]) -> Source:
    biases = set(incoming.biases)
    if not biases:
        return incoming.state
    if not drop:
        raise CheckpointError(
            f"these weights hold {len(biases)} selection biases, which steer the choice of experts; {form} has no "
            "place for them, and without them tokens visit other experts. Give --drop-selection-bias to write it all "
            "the same."
        )
    rows.append(("dropped", f"{len(biases)} selection biases: the model will choose other experts"))
    return incoming.state.renamed({name: name for name in incoming.state if name not in biases})


def _published(plan: Plan, state: Source, form: str) -> Source:
    spec = plan.recipe.model
    if form == "diffusers":
        return derived(partial(diffusers.write_diffusers, spec=spec), state)
    attention = "flash" if form == "dit-moe" and spec.qk_norm else "timm"
    return derived(partial(_published_makes, plan=plan, attention=attention), state)


def _published_makes(state: Mapping[str, Tensor], plan: Plan, attention: str) -> dict[str, Make]:
    return write_published(state, plan.recipe.model, input_size=plan.model.input_size, attention=attention)


def _check_form(plan: Plan, form: str, rows: list[tuple[str, str]]) -> None:
    """CheckpointError when the format cannot say what this model is; rows on what it does not say."""
    spec = plan.recipe.model
    complaint = _mismatch(spec, form)
    if complaint:
        raise CheckpointError(f"these weights cannot be written as {form}: {complaint}.")
    if form == "diffusers" and not plan.model.null_class:
        raise CheckpointError("these weights have no null label, which diffusers' class table always holds.")
    if form == "diffusers" and plan.model.num_classes != diffusers.NULL_LABEL:
        rows.append(
            ("note", f"diffusers' DiTPipeline takes 1000 for the null label; here it is {plan.model.num_classes}")
        )
    usual = {"dit": "ddpm", "sit": "sit", "dit-moe": "flow" if spec.qk_norm else "ddpm", "diffusers": "ddpm"}.get(form)
    if usual and not _is_objective(plan, usual):
        trained = f"{plan.recipe.diffusion.prediction} on {plan.recipe.diffusion.schedule}"
        rows.append(("note", f"{form} files are read as {usual}; these were trained on {trained}, which no file says"))
    if spec.is_moe and spec.top_k != 2:
        rows.append(("note", f"{form} files do not say how many experts a token visits; here it is {spec.top_k}"))


def _is_objective(plan: Plan, name: str) -> bool:
    diffusion = plan.recipe.diffusion
    keys = {"prediction", "schedule", "flow_end"}
    return all(getattr(diffusion, key) == value for key, value in OBJECTIVES[name].items() if key in keys) and (
        diffusion.flow_end == OBJECTIVES[name].get("flow_end", "noise")
    )


def _mismatch(spec: ModelSpec, form: str) -> str:
    """Why the format has no such model, "" when it has."""
    if form in ("dit", "sit", "diffusers") and spec.is_moe:
        return f"it is dense, and these have {spec.num_experts} experts; take dit-moe"
    if form == "dit-moe" and not spec.is_moe:
        return "these are dense; take dit, sit or diffusers"
    if form != "generalist" and spec.tasks:
        return f"it has one patch convolution, and these have {spec.tasks}; take generalist"
    if form == "generalist" and not spec.tasks:
        return "it has one patch convolution a task, and these have one in all"
    if form != "dit-moe" and spec.qk_norm:
        return "it has no q/k norms, and these do"
    if spec.renormalize:
        return "published code does not renormalise the gates of chosen experts, and these were trained with that"
    if form == "diffusers" and spec.mlp_ratio != _DIFFUSERS_RATIO:
        return f"its feed-forward is {_DIFFUSERS_RATIO} times as wide as the model, here {spec.mlp_ratio:g} times"
    return ""
