"""Published state-dict layouts <-> ours, tensor by tensor.

Known layouts: DiT (contracts 2.1.1), DiT-MoE (2.2: one module an expert, SwiGLU; S and B with timm's names of
attention, XL and G with flash-attn's) and upcycled DiT (2.3: one GELU MLP with biases an expert, one patch
convolution or one a task). Ours differs in two ways only: the experts of a block are stacked into three tensors, and
the position embedding is computed, not stored. diffusers' layout is in `diffusers`; files are elsewhere.

`read_published` and `write_published` only say how each tensor is made; made one by one from a mapping that reads a
file when asked (source.Source), a model is never whole in memory. Made from tensors on the meta device, they tell the
shapes of a result beforehand.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from dsmoe.base.accounting import TIMESTEP_DIM
from dsmoe.base.errors import CheckpointError
from dsmoe.base.presets import ModelSpec
from dsmoe.models.embedders import position_embedding

POSITION_KEY = "pos_embed"
POSITION_TOLERANCE = 1e-5
_SHOWN = 6

# Our name of an attention layer -> its name in a layout; layers that are not here have our names. Only names differ:
# rows of Wqkv are ordered (q|k|v, head, feature) like timm's and ours, in flash-attn (flash_attn/modules/mha.py:
# "three h d") and in DiT-MoE (models.py: view(b, s, 3, heads, head_dim)), both read on 2026-11-23.
ATTENTION_LAYOUTS: dict[str, dict[str, str]] = {
    "timm": {},
    "flash": {"qkv": "Wqkv", "proj": "out_proj"},
}

# Our stack of a block's SwiGLU experts -> the published name of one of them.
_SWIGLU_STACKS = {"w1": "gate_proj.weight", "w2": "down_proj.weight", "w3": "up_proj.weight"}

Make = Callable[[], Tensor]

# A None in a shape is a size the architecture leaves open (latent channels, labels, outputs).
Shape = tuple[int | None, ...]


def _common_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Every key both layouts share."""
    dim, patch = spec.dim, spec.patch
    shapes: dict[str, Shape] = {"y_embedder.embedding_table.weight": (None, dim)}
    for conv in [f"proj.conv_in_{i + 1}" for i in range(spec.tasks)] or ["proj"]:
        shapes[f"x_embedder.{conv}.weight"] = (dim, None, patch, patch)
        shapes[f"x_embedder.{conv}.bias"] = (dim,)

    def linear(name: str, out: int | None, inputs: int) -> None:
        shapes[f"{name}.weight"] = (out, inputs)
        shapes[f"{name}.bias"] = (out,)

    linear("t_embedder.mlp.0", dim, TIMESTEP_DIM)
    linear("t_embedder.mlp.2", dim, dim)
    for i in range(spec.depth):
        block = f"blocks.{i}"
        linear(f"{block}.attn.qkv", 3 * dim, dim)
        linear(f"{block}.attn.proj", dim, dim)
        if spec.qk_norm:
            for name in ("q_norm", "k_norm"):
                shapes |= {f"{block}.attn.{name}.{leaf}": (spec.head_dim,) for leaf in ("weight", "bias")}
        linear(f"{block}.adaLN_modulation.1", 6 * dim, dim)
        if not spec.is_moe:
            linear(f"{block}.mlp.fc1", spec.mlp_hidden, dim)
            linear(f"{block}.mlp.fc2", dim, spec.mlp_hidden)
            continue
        shapes[f"{block}.moe.gate.weight"] = (spec.num_experts, dim)
        if spec.shared_hidden:
            shapes[f"{block}.moe.shared_experts.gate_proj.weight"] = (spec.shared_hidden, dim)
            shapes[f"{block}.moe.shared_experts.up_proj.weight"] = (spec.shared_hidden, dim)
            shapes[f"{block}.moe.shared_experts.down_proj.weight"] = (dim, spec.shared_hidden)
    linear("final_layer.linear", None, dim)
    linear("final_layer.adaLN_modulation.1", 2 * dim, dim)
    return shapes


def _expert_prefixes(spec: ModelSpec) -> list[str]:
    return [f"blocks.{i}.moe.experts." for i in range(spec.depth)] if spec.is_moe else []


def _published_expert_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Keys of one expert in the published layouts, after `experts.{e}.`."""
    dim, hidden = spec.dim, spec.mlp_hidden
    if spec.expert_kind == "swiglu":
        return {
            "gate_proj.weight": (hidden, dim),
            "up_proj.weight": (hidden, dim),
            "down_proj.weight": (dim, hidden),
        }
    return {
        "fc1.weight": (hidden, dim),
        "fc1.bias": (hidden,),
        "fc2.weight": (dim, hidden),
        "fc2.bias": (dim,),
    }


def _published_names(spec: ModelSpec, attention: str) -> dict[str, str]:
    """Our key -> published key, for every tensor that is passed on whole."""
    assert attention in ATTENTION_LAYOUTS, f"attention layout {attention!r}, one of {', '.join(ATTENTION_LAYOUTS)}"
    names = {key: key for key in _common_shapes(spec)}
    for i in range(spec.depth):
        for ours, theirs in ATTENTION_LAYOUTS[attention].items():
            for leaf in ("weight", "bias"):
                names[f"blocks.{i}.attn.{ours}.{leaf}"] = f"blocks.{i}.attn.{theirs}.{leaf}"
    return names


def published_shapes(spec: ModelSpec, attention: str = "timm") -> dict[str, Shape]:
    """Key -> shape of the published layout of `spec`; None marks an open size. attention: of ATTENTION_LAYOUTS."""
    names = _published_names(spec, attention)
    shapes = {names[key]: shape for key, shape in _common_shapes(spec).items()}
    shapes[POSITION_KEY] = (1, None, spec.dim)
    for prefix in _expert_prefixes(spec):
        for e in range(spec.num_experts):
            shapes |= {f"{prefix}{e}.{key}": shape for key, shape in _published_expert_shapes(spec).items()}
    return shapes


def our_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Key -> shape of `DiT(spec, ...).state_dict()`; None marks an open size."""
    shapes = _common_shapes(spec)
    experts, dim, hidden = spec.num_experts, spec.dim, spec.mlp_hidden
    third = (experts, hidden, dim) if spec.expert_kind == "swiglu" else (experts, 1, hidden + dim)
    for prefix in _expert_prefixes(spec):
        shapes |= {
            f"{prefix}w1": (experts, hidden, dim),
            f"{prefix}w2": (experts, dim, hidden),
            f"{prefix}w3": third,
        }
    return shapes


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _fits(tensor: Tensor, shape: Shape) -> bool:
    return len(tensor.shape) == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )


def _shown(shape: Shape) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def outline_of(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of the shapes and dtypes of `state`, without reading a file for them."""
    return getattr(state, "outline", state)


def check(state: Mapping[str, Tensor], expected: Mapping[str, Shape], layout: str) -> None:
    """CheckpointError that names every kind of disagreement between `state` and `expected` at once."""
    found = outline_of(state)
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    wrong = [
        f"{key} {list(found[key].shape)} instead of {_shown(shape)}"
        for key, shape in expected.items()
        if key in found and not _fits(found[key], shape)
    ]
    parts = [
        f"{len(names)} {kind}: {_list(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of wrong shape", wrong))
        if names
    ]
    if parts:
        raise CheckpointError(
            f"these weights are not the {layout} layout of this model: {'; '.join(parts)}. "
            "Choose the preset the weights were made with."
        )


def check_position(table: Tensor, dim: int) -> None:
    """A stored position embedding must be the computed one: within 1e-5, or one ulp of 1 in a shorter dtype.

    Another order of sine and cosine, of rows and columns, or a rescaled grid differs by order 1; an angle
    computed in fp32 instead of fp64 by at most 63 * 2^-24 = 4e-6 on the largest grid in use.
    """
    grid = math.isqrt(table.shape[1])
    if grid * grid != table.shape[1]:
        raise CheckpointError(f"pos_embed has {table.shape[1]} tokens; it must be a square number.")
    computed = torch.from_numpy(position_embedding(dim, grid))
    worst = (table[0].double().cpu() - computed).abs().max().item()
    allowed = max(POSITION_TOLERANCE, torch.finfo(table.dtype).eps)
    if not worst <= allowed:
        raise CheckpointError(
            f"pos_embed differs from the 2-D sine-cosine embedding by {worst:.3g} (allowed {allowed:.3g}); "
            "only fixed, column-first embeddings on the integer grid are supported."
        )


def _stack(state: Mapping[str, Tensor], prefix: str, key: str, experts: int) -> Tensor:
    outline = outline_of(state)
    dtypes = {outline[f"{prefix}{e}.{key}"].dtype for e in range(experts)}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{prefix}*.{key} mixes {', '.join(sorted(map(str, dtypes)))}; experts of a block need one dtype."
        )
    first = state[f"{prefix}0.{key}"]
    stack = first.new_empty((experts, *first.shape))
    for e in range(experts):
        stack[e] = state[f"{prefix}{e}.{key}"]
    return stack


def read_published(state: Mapping[str, Tensor], spec: ModelSpec, *, attention: str = "timm") -> dict[str, Make]:
    """Our key -> what makes its tensor from published weights, bit for bit; see `from_published`.

    The position embedding is not looked at (check_position).
    """
    check(state, published_shapes(spec, attention), f"published {attention}")
    made: dict[str, Make] = {
        key: partial(state.__getitem__, name) for key, name in _published_names(spec, attention).items()
    }
    for prefix in _expert_prefixes(spec):
        stack = partial(_stack, state, prefix, experts=spec.num_experts)
        if spec.expert_kind == "swiglu":
            made |= {f"{prefix}{name}": partial(stack, key) for name, key in _SWIGLU_STACKS.items()}
            continue
        made |= {f"{prefix}w1": partial(stack, "fc1.weight"), f"{prefix}w2": partial(stack, "fc2.weight")}
        made[f"{prefix}w3"] = partial(_packed_biases, stack)
    return made


def _packed_biases(stack: Callable[[str], Tensor]) -> Tensor:
    return join([stack("fc1.bias"), stack("fc2.bias")], dim=1)[:, None]


def join(tensors: list[Tensor], dim: int) -> Tensor:
    """torch.cat, whose form for the meta device takes ten seconds to import."""
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    joined, start = tensors[0].new_empty(shape), 0
    for tensor in tensors:
        joined.narrow(dim, start, tensor.shape[dim]).copy_(tensor)
        start += tensor.shape[dim]
    return joined


def write_published(
    state: Mapping[str, Tensor], spec: ModelSpec, *, input_size: int, attention: str = "timm"
) -> dict[str, Make]:
    """Published key -> what makes its tensor from our weights; see `to_published`."""
    check(state, our_shapes(spec), "dsmoe")
    assert input_size % spec.patch == 0, (input_size, spec.patch)
    made: dict[str, Make] = {POSITION_KEY: partial(_position_table, spec.dim, input_size // spec.patch)}
    made |= {name: partial(state.__getitem__, key) for key, name in _published_names(spec, attention).items()}
    for prefix in _expert_prefixes(spec):
        if spec.expert_kind == "swiglu":
            places = {key: (name, ...) for name, key in _SWIGLU_STACKS.items()}
        else:
            places = {"fc1.weight": ("w1", ...), "fc2.weight": ("w2", ...)}
            places["fc1.bias"] = "w3", (0, slice(None, spec.mlp_hidden))
            places["fc2.bias"] = "w3", (0, slice(spec.mlp_hidden, None))
        for key, (name, part) in places.items():
            for e in range(spec.num_experts):
                made[f"{prefix}{e}.{key}"] = partial(_expert, state, f"{prefix}{name}", e, part)
    return made


def _position_table(dim: int, grid: int) -> Tensor:
    return torch.from_numpy(position_embedding(dim, grid)).float()[None]


def _expert(state: Mapping[str, Tensor], stack: str, expert: int, part: object) -> Tensor:
    return state[stack][expert][part]


def from_published(state: Mapping[str, Tensor], spec: ModelSpec, *, attention: str = "timm") -> dict[str, Tensor]:
    """Published weights as our state dict, bit for bit; tensors that need no packing are passed on, not
    copied. attention: the layout of ATTENTION_LAYOUTS, "flash" for the released DiT-MoE XL and G.

    Raises CheckpointError naming missing, unexpected and wrongly shaped keys, or a foreign position
    embedding. The grid of `pos_embed` may be any square; the model the result goes into computes its own.
    """
    check(state, published_shapes(spec, attention), f"published {attention}")
    check_position(state[POSITION_KEY], spec.dim)
    return {key: make() for key, make in read_published(state, spec, attention=attention).items()}


def to_published(
    state: Mapping[str, Tensor], spec: ModelSpec, *, input_size: int, attention: str = "timm"
) -> dict[str, Tensor]:
    """Our state dict in the published layout, with `pos_embed` in fp32 for a latent side of `input_size`.

    Tensors are passed on or are views of the packed ones, not copies. attention and CheckpointError as in
    `from_published`.
    """
    made = write_published(state, spec, input_size=input_size, attention=attention)
    return {name: make() for name, make in made.items()}
