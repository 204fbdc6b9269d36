"""What a set of tensors is: its key layout, and the architecture that its shapes tell. No values are read.

Names of files say nothing here. What shapes do not tell (attention heads, experts a token visits) comes from the
presets that have these shapes, or from the user; two answers are never guessed between.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dsmoe.base.errors import CheckpointError, ConfigError, choose_from
from dsmoe.base.presets import PRESETS, ModelSpec
from dsmoe.convert.keys import POSITION_KEY

LATENT_CHANNELS = 4  # of Stable Diffusion's autoencoder, which every published DiT works in
PUBLISHED_TOP_K = 2
LAYOUTS = ("timm", "flash", "diffusers", "dsmoe")
_CONV = re.compile(r"x_embedder\.proj\.conv_in_(\d+)\.weight")
# Rows of published label tables: (labels, null row?, what it is).
_TABLES = {
    1000: (1000, False, "trained without label dropout: no null label"),
    1001: (1000, True, "ImageNet, null label 1000"),
    1002: (1001, True, "a fine-tuning with one task label (1000): null label 1001"),
    1005: (1004, True, "fine-tuned for perception: task labels 1000 to 1003, null label 1004"),
}


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the user says of weights beyond what they show; None where nothing."""

    preset: str | None = None
    heads: int | None = None
    top_k: int | None = None
    num_classes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """layout: of LAYOUTS. preset: its name, "" for none. input_size: latent side of the stored position embedding or
    config, None when nothing says. why, notes: what was seen, for the report."""

    layout: str
    spec: ModelSpec
    preset: str
    channels: int
    learn_sigma: bool
    num_classes: int
    null_class: bool
    input_size: int | None
    why: str
    notes: tuple[str, ...]


def recognise(outline: Mapping[str, Tensor], given: Given, config: Mapping[str, object] | None = None) -> Recognised:
    """The layout and architecture of tensors of these names and shapes; CheckpointError when they are none known.

    config: diffusers' config.json, where there is one. ConfigError for what is given and does not fit.
    """
    layout, why = _layout(outline)
    spec, notes = _architecture(outline, layout, config)
    spec, preset, said = _settle(spec, given, known_heads=config is not None or spec.qk_norm)
    notes += said
    table = _need(outline, _TABLE[layout == "diffusers"], 2)
    num_classes, null_class, about = _labels(table.shape[0], given.num_classes, spec)
    channels, conditions, learn_sigma = _latents(outline, layout, spec)
    return Recognised(
        layout=layout,
        spec=dataclasses.replace(spec, conditions=conditions),
        preset=_named(dataclasses.replace(spec, conditions=conditions), preset),
        channels=channels,
        learn_sigma=learn_sigma,
        num_classes=num_classes,
        null_class=null_class,
        input_size=_side(outline, spec, config),
        why=why,
        notes=(*notes, f"label table of {table.shape[0]} rows: {about}"),
    )


_TABLE = ("y_embedder.embedding_table.weight", "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight")


def _layout(outline: Mapping[str, Tensor]) -> tuple[str, str]:
    marks = [
        ("diffusers", "transformer_blocks.0.attn1.to_q.weight"),
        ("flash", "blocks.0.attn.Wqkv.weight"),
        ("dsmoe", "blocks.0.moe.experts.w1"),
        ("timm", "blocks.0.attn.qkv.weight"),
    ]
    found = [(layout, key) for layout, key in marks if key in outline]
    if not found:
        shown = ", ".join(list(outline)[:4])
        raise CheckpointError(
            f"these {len(outline)} tensors are of no layout that dsmoe knows ({shown} ...): none of "
            f"{', '.join(key for _, key in marks)} is among them. docs/convert.md lists what can be read."
        )
    if len(found) > 1 and [layout for layout, _ in found] != ["dsmoe", "timm"]:
        raise CheckpointError(f"these tensors are of two layouts at once: {' and '.join(key for _, key in found)}.")
    layout, key = found[0]
    if layout == "timm" and POSITION_KEY not in outline and "blocks.0.moe.gate.weight" not in outline:
        return "dsmoe", f"{key}, and no {POSITION_KEY}, which published weights hold and ours do not"
    return layout, f"it holds {key}"


def _need(outline: Mapping[str, Tensor], key: str, dimensions: int) -> Tensor:
    if key not in outline:
        raise CheckpointError(f"these weights lack {key}, without which their architecture cannot be told.")
    if outline[key].ndim != dimensions:
        raise CheckpointError(f"{key} has shape {list(outline[key].shape)} instead of {dimensions} dimensions.")
    return outline[key]


def _architecture(
    outline: Mapping[str, Tensor], layout: str, config: Mapping[str, object] | None
) -> tuple[ModelSpec, tuple[str, ...]]:
    """What shapes tell; heads 1 and top_k 2 where they do not."""
    if layout == "diffusers":
        return _diffusers_architecture(outline, config), ()
    tasks = [int(m[1]) for key in outline if (m := _CONV.fullmatch(key))]
    if sorted(tasks) != list(range(1, len(tasks) + 1)):
        raise CheckpointError(f"these weights hold patch convolutions {sorted(tasks)}; they must be 1, 2, ...")
    conv = _need(outline, "x_embedder.proj.conv_in_1.weight" if tasks else "x_embedder.proj.weight", 4)
    dim = conv.shape[0]
    blocks = [int(m[1]) for key in outline if (m := re.match(r"blocks\.(\d+)\.", key))]
    norm = "blocks.0.attn.q_norm.weight"
    facts: dict[str, object] = {"qk_norm": norm in outline, "tasks": len(tasks)}
    if facts["qk_norm"]:
        head = outline[norm].shape[0]
        facts["heads"] = dim // head if head and dim % head == 0 else 1
    if "blocks.0.moe.gate.weight" in outline:
        facts |= _experts(outline, layout, dim)
    else:
        facts["mlp_ratio"] = _need(outline, "blocks.0.mlp.fc1.weight", 2).shape[0] / dim
    try:
        return ModelSpec(depth=max(blocks) + 1, dim=dim, patch=conv.shape[-1], **{"heads": 1, **facts}), ()
    except ConfigError as error:
        raise CheckpointError(f"these shapes are of no DiT: {error}") from error


def _experts(outline: Mapping[str, Tensor], layout: str, dim: int) -> dict[str, object]:
    experts = _need(outline, "blocks.0.moe.gate.weight", 2).shape[0]
    if layout == "dsmoe":
        gelu = _need(outline, "blocks.0.moe.experts.w3", 3).shape[1] == 1
        hidden = _need(outline, "blocks.0.moe.experts.w1", 3).shape[1]
    else:
        gelu = "blocks.0.moe.experts.0.fc1.weight" in outline
        hidden = _need(outline, f"blocks.0.moe.experts.0.{'fc1' if gelu else 'gate_proj'}.weight", 2).shape[0]
    facts = {"num_experts": experts, "expert_kind": "gelu" if gelu else "swiglu", "mlp_ratio": hidden / dim}
    facts["top_k"] = min(PUBLISHED_TOP_K, experts)
    shared = "blocks.0.moe.shared_experts.gate_proj.weight"
    return facts | ({"shared_ratio": outline[shared].shape[0] / dim} if shared in outline else {})


def _diffusers_architecture(outline: Mapping[str, Tensor], config: Mapping[str, object] | None) -> ModelSpec:
    if config is None:
        raise CheckpointError(
            "these are diffusers' keys without a config.json; give the folder that holds both, not the file alone."
        )
    heads = int(config["num_attention_heads"])
    dim = heads * int(config["attention_head_dim"])
    hidden = _need(outline, "transformer_blocks.0.ff.net.0.proj.weight", 2).shape[0]
    return ModelSpec(
        depth=int(config["num_layers"]), dim=dim, heads=heads, patch=int(config["patch_size"]), mlp_ratio=hidden / dim
    )


def _settle(spec: ModelSpec, given: Given, *, known_heads: bool) -> tuple[ModelSpec, str, tuple[str, ...]]:
    """The spec with its heads and top_k, the preset it is, and notes on where they come from."""
    if given.preset is not None:
        return _as_preset(spec, given), given.preset, ()
    notes: tuple[str, ...] = ()
    presets = {name: p for name, p in PRESETS.items() if _like(p, spec, known_heads)}
    # The architecture's family decides where the very network has no name: an upcycled a3 has a3's heads.
    family = presets or {n: p for n, p in PRESETS.items() if (p.depth, p.dim) == (spec.depth, spec.dim)}
    if given.heads is not None:
        spec = _changed(spec, heads=given.heads)
    elif not known_heads:
        heads = sorted({p.heads for p in family.values()})
        if len(heads) != 1:
            options = f"{' or '.join(map(str, heads))} are known" if heads else "no preset is of this depth and width"
            raise CheckpointError(
                f"weights of depth {spec.depth} and width {spec.dim} do not show their number of attention heads, and "
                f"{options}; give --heads N, or --preset NAME."
            )
        spec = _changed(spec, heads=heads[0])
    if spec.is_moe and given.top_k is not None:
        spec = _changed(spec, top_k=given.top_k)
    elif spec.is_moe and not presets:
        if not family:
            raise CheckpointError(
                f"weights with {spec.num_experts} experts do not show how many a token visits; give --top-k N (2 in "
                "all published models)."
            )
        notes = (f"top_k {spec.top_k}, as in every published model: the weights do not show it",)
    return spec, next((name for name, p in presets.items() if p == spec), ""), notes


def _changed(spec: ModelSpec, **fields: object) -> ModelSpec:
    try:
        return dataclasses.replace(spec, **fields)
    except ConfigError as error:
        raise ConfigError(f"these weights have width {spec.dim} and {spec.num_experts} experts: {error}") from error


def _like(preset: ModelSpec, spec: ModelSpec, known_heads: bool) -> bool:
    """Whether a preset has these shapes."""
    heads = spec.heads if known_heads else preset.heads
    try:
        return dataclasses.replace(spec, heads=heads, top_k=preset.top_k, conditions=preset.conditions) == preset
    except ConfigError:  # heads of another preset do not divide this width
        return False


def _as_preset(spec: ModelSpec, given: Given) -> ModelSpec:
    if given.preset not in PRESETS:
        raise ConfigError(choose_from("--preset", given.preset, PRESETS))
    wanted = PRESETS[given.preset]
    if given.heads not in (None, wanted.heads) or given.top_k not in (None, wanted.top_k):
        raise ConfigError(
            f"--preset {given.preset} has {wanted.heads} heads, top_k {wanted.top_k}; leave the others out."
        )
    ignored = {"heads": wanted.heads, "top_k": wanted.top_k, "conditions": wanted.conditions}
    different = [
        f"{f.name} {getattr(spec, f.name)} instead of {getattr(wanted, f.name)}"
        for f in dataclasses.fields(ModelSpec)
        if f.name not in (*ignored, "renormalize") and getattr(spec, f.name) != getattr(wanted, f.name)
    ]
    if different:
        raise CheckpointError(f"these weights are not of --preset {given.preset}: {', '.join(different)}.")
    return wanted


def _named(spec: ModelSpec, preset: str) -> str:
    return preset if preset and PRESETS[preset] == spec else next((n for n, p in PRESETS.items() if p == spec), "")


def _labels(rows: int, classes: int | None, spec: ModelSpec) -> tuple[int, bool, str]:
    """(labels, whether the last row is the null label, what the table is)."""
    if classes is not None:
        if classes not in (rows, rows - 1):
            raise ConfigError(
                f"--num-classes is {classes}, but the label table has {rows} rows: give {rows - 1} or {rows}."
            )
        return classes, classes == rows - 1, "as --num-classes says"
    if spec.tasks and rows == spec.tasks:
        return rows, False, "one a task, no null label"
    labels, null, about = _TABLES.get(
        rows, (rows - 1, True, "the last one taken for the null label (else --num-classes)")
    )
    if labels < max(spec.tasks, 1):
        raise CheckpointError(f"the label table has {rows} rows, too few for {spec.tasks} tasks and their labels.")
    return labels, null, about


def _latents(outline: Mapping[str, Tensor], layout: str, spec: ModelSpec) -> tuple[int, int, bool]:
    """(latent channels, condition latents, learn_sigma) from the first and the last layer.

    Where both readings are possible, the one with Stable Diffusion's four channels is right: all published are.
    """
    if layout == "diffusers":
        first, last = "pos_embed.proj.weight", "proj_out_2.weight"
    else:
        first = "x_embedder.proj.conv_in_1.weight" if spec.tasks else "x_embedder.proj.weight"
        last = "final_layer.linear.weight"
    taken, given = _need(outline, first, 4).shape[1], _need(outline, last, 2).shape[0] / spec.patch**2
    possible = [
        (int(channels), taken // int(channels) - 1, sigma)
        for channels, sigma in ((given, False), (given / 2, True))
        if channels >= 1 and channels == int(channels) and taken % int(channels) == 0
    ]
    if not possible:
        raise CheckpointError(
            f"{first} takes {taken} channels and {last} gives {given:g}; outputs are those of one latent, or twice."
        )
    return min(possible, key=lambda p: (p[0] != LATENT_CHANNELS, p[1]))


def _side(outline: Mapping[str, Tensor], spec: ModelSpec, config: Mapping[str, object] | None) -> int | None:
    if config is not None:
        return int(config["sample_size"])
    if POSITION_KEY not in outline:
        return None
    tokens = _need(outline, POSITION_KEY, 3).shape[1]
    return math.isqrt(tokens) * spec.patch
