"""diffusers' DiTTransformer2DModel <-> our keys, and its config.json; diffusers itself is not needed.

The weights are the same numbers under other names, with two differences of form: queries, keys and values are three
layers, and every block holds a copy of the timestep and label embedders (the model uses them all; in published weights
they are equal). What the class computes differs from DiT (contracts 2.1.9): docs/convert.md has the numbers.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsmoe.base.accounting import TIMESTEP_DIM
from dsmoe.base.errors import CheckpointError
from dsmoe.base.presets import ModelSpec
from dsmoe.convert.keys import Make, Shape, check, join, our_shapes

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
CLASS_NAME = "DiTTransformer2DModel"
NULL_LABEL = 1000  # its pipeline knows no other
# What the class may not be configured to without being another network than DiT: key -> the value it must have.
_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}

# Their module -> ours; weight and bias alike. `{i}` is the block.
_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_BLOCK = {
    "transformer_blocks.{i}.norm1.linear": "blocks.{i}.adaLN_modulation.1",
    "transformer_blocks.{i}.attn1.to_out.0": "blocks.{i}.attn.proj",
    "transformer_blocks.{i}.ff.net.0.proj": "blocks.{i}.mlp.fc1",
    "transformer_blocks.{i}.ff.net.2": "blocks.{i}.mlp.fc2",
}
_EMBEDDERS = {
    "transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1.weight": "t_embedder.mlp.0.weight",
    "transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1.bias": "t_embedder.mlp.0.bias",
    "transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
    "transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_2.bias": "t_embedder.mlp.2.bias",
    "transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight": "y_embedder.embedding_table.weight",
}


def _whole(spec: ModelSpec) -> dict[str, str]:
    """Their key -> ours, for every tensor that is passed on whole and stands there once."""
    modules = dict(_OUTSIDE)
    for i in range(spec.depth):
        modules |= {theirs.format(i=i): ours.format(i=i) for theirs, ours in _BLOCK.items()}
    return {f"{t}.{leaf}": f"{o}.{leaf}" for t, o in modules.items() for leaf in ("weight", "bias")}


def _attention(i: int, letter: str, leaf: str) -> str:
    return f"transformer_blocks.{i}.attn1.to_{letter}.{leaf}"


def diffusers_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Key -> shape of the class's state dict; None marks an open size. spec: dense."""
    ours, dim = our_shapes(spec), spec.dim
    shapes = {theirs: ours[key] for theirs, key in _whole(spec).items()}
    for i in range(spec.depth):
        shapes |= {theirs.format(i=i): ours[key] for theirs, key in _EMBEDDERS.items()}
        for letter in "qkv":
            shapes |= {_attention(i, letter, "weight"): (dim, dim), _attention(i, letter, "bias"): (dim,)}
    return shapes


def read_diffusers(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Make]:
    """Our key -> what makes its tensor from the class's weights; the embedders are block 0's (see check_copies)."""
    check(state, diffusers_shapes(spec), "diffusers")
    made: dict[str, Make] = {
        ours: partial(state.__getitem__, theirs.format(i=0)) for theirs, ours in _EMBEDDERS.items()
    }
    made |= {ours: partial(state.__getitem__, theirs) for theirs, ours in _whole(spec).items()}
    for i in range(spec.depth):
        for leaf in ("weight", "bias"):
            made[f"blocks.{i}.attn.qkv.{leaf}"] = partial(_joined, state, [_attention(i, a, leaf) for a in "qkv"])
    return made


def _joined(state: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return join([state[name] for name in names], dim=0)


def write_diffusers(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Make]:
    """Their key -> what makes its tensor from our weights: depth - 1 more copies of both embedders."""
    check(state, our_shapes(spec), "dsmoe")
    made: dict[str, Make] = {theirs: partial(state.__getitem__, ours) for theirs, ours in _whole(spec).items()}
    for i in range(spec.depth):
        for leaf in ("weight", "bias"):
            for third, letter in enumerate("qkv"):
                made[_attention(i, letter, leaf)] = partial(_third, state, f"blocks.{i}.attn.qkv.{leaf}", third)
        made |= {theirs.format(i=i): partial(state.__getitem__, ours) for theirs, ours in _EMBEDDERS.items()}
    return made


def _third(state: Mapping[str, Tensor], name: str, third: int) -> Tensor:
    return state[name].chunk(3)[third]


def check_copies(state: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """CheckpointError unless every block's embedders equal block 0's, bit for bit: DiT has one of each."""
    for theirs in _EMBEDDERS:
        first = state[theirs.format(i=0)].clone()
        for i in range(1, spec.depth):
            if not torch.equal(state[theirs.format(i=i)], first):
                raise CheckpointError(
                    f"{theirs.format(i=i)} differs from block 0's: these blocks were trained with embedders of their "
                    "own, and DiT has one for all; such weights cannot be converted."
                )


def embedder_copies(spec: ModelSpec, rows: int) -> int:
    """Parameters that the class holds beyond ours."""
    dim = spec.dim
    return (spec.depth - 1) * (TIMESTEP_DIM * dim + dim + dim * dim + dim + rows * dim)


def config_of(spec: ModelSpec, *, input_size: int, channels: int, out_channels: int, num_classes: int) -> dict:
    """config.json of a model of ours, as diffusers writes it for published DiT weights."""
    return {
        "_class_name": CLASS_NAME,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": spec.head_dim,
        "dropout": 0.0,
        "in_channels": channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": spec.heads,
        "num_embeds_ada_norm": num_classes,
        "num_layers": spec.depth,
        "out_channels": out_channels,
        "patch_size": spec.patch,
        "sample_size": input_size,
        "upcast_attention": False,
    }


def read_config(path: Path) -> dict:
    """A model's config.json; CheckpointError unless it is the class and one of its settings that is a DiT."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise CheckpointError(f"{path} is not a JSON object ({error}); restore it.") from error
    if config.get("_class_name") != CLASS_NAME:
        raise CheckpointError(f"{path} is of class {config.get('_class_name')!r}; only {CLASS_NAME} is a DiT.")
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"{path} has {key} {config[key]!r}; a DiT has {value!r}.")
    try:
        {key: int(config[key]) for key in ("num_attention_heads", "attention_head_dim", "num_layers", "patch_size")}
        int(config["sample_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} lacks a whole number ({error}).") from error
    return config
