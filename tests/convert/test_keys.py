"""Published layouts, written out by hand from contracts 2.1-2.3, against ours."""

import dataclasses
import math

import pytest
import torch

from dsmoe.base.errors import CheckpointError
from dsmoe.base.presets import ModelSpec, preset
from dsmoe.convert.keys import from_published, published_shapes, to_published
from dsmoe.models.dit import DiT
from dsmoe.models.embedders import position_embedding

D, H, LAYERS, EXPERTS, SIDE, PATCH, CLASSES = 16, 64, 2, 3, 8, 2, 10
DENSE = ModelSpec(depth=LAYERS, dim=D, heads=2, patch=PATCH)
SWIGLU = dataclasses.replace(DENSE, num_experts=EXPERTS, shared_ratio=2.0)
GELU = dataclasses.replace(DENSE, num_experts=EXPERTS, expert_kind="gelu")
FLASH = dataclasses.replace(SWIGLU, qk_norm=True)
SPECS = {"dense": DENSE, "swiglu": SWIGLU, "gelu": GELU, "flash": FLASH}
every_layout = pytest.mark.parametrize("kind", SPECS)


def sincos(h_first=False, scale=1.0):
    """The position table by the formula, one element at a time."""
    grid, quarter = SIDE // PATCH, D // 4
    table = torch.empty(1, grid * grid, D, dtype=torch.float64)
    for row in range(grid):
        for column in range(grid):
            for feature in range(D):
                first = row if h_first else column
                coordinate = scale * (first if feature < D // 2 else row + column - first)
                wave = math.sin if feature % (D // 2) < quarter else math.cos
                angle = coordinate / 10000 ** (feature % quarter / quarter)
                table[0, row * grid + column, feature] = wave(angle)
    return table.float()


def ours(state, kind):
    """From the published layout of that kind of model."""
    return from_published(state, SPECS[kind], attention="flash" if kind == "flash" else "timm")


def theirs(state, kind):
    """To the published layout of that kind of model."""
    attention = "flash" if kind == "flash" else "timm"
    return to_published(state, SPECS[kind], input_size=SIDE, attention=attention)


def published(kind):
    """A random state dict with the published names."""
    shapes = {
        "x_embedder.proj.weight": (D, 4, 2, 2),
        "x_embedder.proj.bias": (D,),
        "t_embedder.mlp.0.weight": (D, 256),
        "t_embedder.mlp.0.bias": (D,),
        "t_embedder.mlp.2.weight": (D, D),
        "t_embedder.mlp.2.bias": (D,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, D),
        "final_layer.linear.weight": (2 * 2 * 8, D),
        "final_layer.linear.bias": (2 * 2 * 8,),
        "final_layer.adaLN_modulation.1.weight": (2 * D, D),
        "final_layer.adaLN_modulation.1.bias": (2 * D,),
    }
    block = {
        "attn.qkv.weight": (3 * D, D),
        "attn.qkv.bias": (3 * D,),
        "attn.proj.weight": (D, D),
        "attn.proj.bias": (D,),
        "adaLN_modulation.1.weight": (6 * D, D),
        "adaLN_modulation.1.bias": (6 * D,),
    }
    if kind == "flash":
        block = {key.replace("qkv", "Wqkv").replace(".proj", ".out_proj"): shape for key, shape in block.items()}
        norms = ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")
        block |= {f"attn.{key}": (D // 2,) for key in norms}
    mlp = {"fc1.weight": (H, D), "fc1.bias": (H,), "fc2.weight": (D, H), "fc2.bias": (D,)}
    swiglu = {"gate_proj.weight": (H, D), "up_proj.weight": (H, D), "down_proj.weight": (D, H)}
    if kind == "dense":
        block |= {f"mlp.{key}": shape for key, shape in mlp.items()}
    else:
        block["moe.gate.weight"] = (EXPERTS, D)
        for e in range(EXPERTS):
            expert = mlp if kind == "gelu" else swiglu
            block |= {f"moe.experts.{e}.{key}": shape for key, shape in expert.items()}
    if kind in ("swiglu", "flash"):
        block |= {
            "moe.shared_experts.gate_proj.weight": (2 * D, D),
            "moe.shared_experts.up_proj.weight": (2 * D, D),
            "moe.shared_experts.down_proj.weight": (D, 2 * D),
        }
    shapes |= {f"blocks.{i}.{key}": shape for i in range(LAYERS) for key, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return state | {"pos_embed": sincos()}


def model(spec, **options):
    return DiT(spec, input_size=SIDE, in_channels=4, num_classes=CLASSES, learn_sigma=True, **options)


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_weights_survive_the_round_trip_bit_for_bit(kind, dtype):
    source = {key: value.to(dtype) for key, value in published(kind).items()}
    source["pos_embed"] = sincos()
    assert_same(theirs(ours(source, kind), kind), source)


@every_layout
def test_our_weights_survive_the_round_trip_bit_for_bit(kind):
    state = model(SPECS[kind]).state_dict()
    with torch.no_grad():
        for value in state.values():
            value.normal_()
    assert_same(ours(theirs(state, kind), kind), dict(state))


@every_layout
def test_published_weights_load_strictly(kind):
    model(SPECS[kind]).load_state_dict(ours(published(kind), kind), strict=True)


@every_layout
def test_input_is_not_changed(kind):
    source = published(kind)
    copy = {key: value.clone() for key, value in source.items()}
    ours(source, kind)
    assert_same(source, copy)


# What contracts 2.2 lists for one block of the released XL and G, with D hidden, h = D / heads and E experts.
RELEASED_BLOCK = {
    "moe.gate.weight": "E D",
    "moe.experts.{e}.gate_proj.weight": "4D D",
    "moe.experts.{e}.up_proj.weight": "4D D",
    "moe.experts.{e}.down_proj.weight": "D 4D",
    "moe.shared_experts.gate_proj.weight": "2D D",
    "moe.shared_experts.up_proj.weight": "2D D",
    "moe.shared_experts.down_proj.weight": "D 2D",
    "attn.Wqkv.weight": "3D D",
    "attn.Wqkv.bias": "3D",
    "attn.out_proj.weight": "D D",
    "attn.out_proj.bias": "D",
    "attn.q_norm.weight": "h",
    "attn.q_norm.bias": "h",
    "attn.k_norm.weight": "h",
    "attn.k_norm.bias": "h",
    "adaLN_modulation.1.weight": "6D D",
    "adaLN_modulation.1.bias": "6D",
}
RELEASED_REST = {
    "pos_embed": "1 T D",
    "x_embedder.proj.weight": "D 4 2 2",
    "x_embedder.proj.bias": "D",
    "t_embedder.mlp.0.weight": "D 256",
    "t_embedder.mlp.0.bias": "D",
    "t_embedder.mlp.2.weight": "D D",
    "t_embedder.mlp.2.bias": "D",
    "y_embedder.embedding_table.weight": "1001 D",
    "final_layer.linear.weight": "32 D",
    "final_layer.linear.bias": "32",
    "final_layer.adaLN_modulation.1.weight": "2D D",
    "final_layer.adaLN_modulation.1.bias": "2D",
}


def released(depth, dim, heads, experts):
    """Every key and shape of a released checkpoint, at 256 pixels."""
    sizes = {"D": dim, "2D": 2 * dim, "3D": 3 * dim, "4D": 4 * dim, "6D": 6 * dim, "h": dim // heads}
    sizes |= {"E": experts, "T": 256}
    keys = dict(RELEASED_REST)
    for i in range(depth):
        for key, shape in RELEASED_BLOCK.items():
            keys |= {f"blocks.{i}.{key.format(e=e)}": shape for e in (range(experts) if "{e}" in key else (0,))}
    return {key: tuple(sizes.get(s) or int(s) for s in shape.split()) for key, shape in keys.items()}


@pytest.mark.parametrize(
    ("name", "sizes"), [("XL/2-8E2A", (28, 1152, 16, 8)), ("G/2-16E2A", (40, 1408, 16, 16))], ids=["XL", "G"]
)
def test_every_tensor_of_the_released_models_is_mapped_once(name, sizes):
    """On the meta device at full size, into the state dict of the preset's model."""
    spec, shapes = preset(name), released(*sizes)
    expected = published_shapes(spec, "flash")
    assert expected.keys() == shapes.keys()
    assert all(want in (None, got) for key in shapes for want, got in zip(expected[key], shapes[key], strict=True))
    with torch.device("meta"):
        source = {key: torch.empty(shape) for key, shape in shapes.items()}
        target = DiT(spec, input_size=32, in_channels=4, num_classes=1000, learn_sigma=True)
    source["pos_embed"] = torch.from_numpy(position_embedding(spec.dim, 16)).float()[None]
    result = from_published(source, spec, attention="flash")
    wanted = {key: tuple(value.shape) for key, value in target.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in result.items()} == wanted
    whole = [key for key in result if ".moe.experts." not in key]
    assert len({id(result[key]) for key in whole}) == len(whole)
    kept = sum(value.numel() for key, value in source.items() if key != "pos_embed")
    assert sum(value.numel() for value in result.values()) == kept


def test_only_the_names_of_attention_differ_between_the_layouts():
    source = published("flash")
    result = ours(source, "flash")
    for i in range(LAYERS):
        for here, there in (("qkv", "Wqkv"), ("proj", "out_proj")):
            for leaf in ("weight", "bias"):
                assert result[f"blocks.{i}.attn.{here}.{leaf}"] is source[f"blocks.{i}.attn.{there}.{leaf}"]
    with pytest.raises(
        CheckpointError, match=r"published timm layout.*blocks\.0\.attn\.qkv\.weight.*attn\.Wqkv\.weight"
    ):
        from_published(source, FLASH)
    with pytest.raises(CheckpointError, match=r"missing: blocks\.0\.attn\.q_norm\.weight"):
        from_published(published("swiglu"), FLASH)
    as_timm = to_published(result, FLASH, input_size=SIDE)
    assert_same(from_published(as_timm, FLASH), result)
    with pytest.raises(AssertionError, match="fused"):
        from_published(source, FLASH, attention="fused")


def test_expert_matrices_mean_what_their_names_say():
    """Each expert alone, called as published: down(silu(gate(x)) * up(x)), or fc2(gelu(fc1(x)))."""
    x = torch.randn(1, 5, D, dtype=torch.float64)
    for kind, spec in (("swiglu", SWIGLU), ("gelu", GELU)):
        source = {key: value.double() for key, value in published(kind).items()}
        target = model(spec).double()
        target.load_state_dict(from_published(source, spec))
        for e in range(EXPERTS):
            p = {
                key.rpartition(f"blocks.1.moe.experts.{e}.")[2]: value
                for key, value in source.items()
                if key.startswith(f"blocks.1.moe.experts.{e}.")
            }
            if kind == "swiglu":
                hidden = torch.nn.functional.silu(x @ p["gate_proj.weight"].T) * (x @ p["up_proj.weight"].T)
                expected = hidden @ p["down_proj.weight"].T
            else:
                hidden = x @ p["fc1.weight"].T + p["fc1.bias"]
                hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
                expected = hidden @ p["fc2.weight"].T + p["fc2.bias"]
            counts = torch.zeros(EXPERTS, dtype=torch.int64)
            counts[e] = 5
            got = target.blocks[1].moe.experts(x[0], counts)
            torch.testing.assert_close(got, expected[0], rtol=1e-12, atol=1e-12)


def test_every_kind_of_disagreement_is_named_in_one_line():
    state = published("swiglu")
    del state["blocks.1.attn.proj.bias"]
    state["blocks.0.attn.q_norm.weight"] = torch.ones(8)
    state["blocks.0.moe.experts.2.up_proj.weight"] = torch.ones(H, D + 1)
    with pytest.raises(CheckpointError) as error:
        from_published(state, SWIGLU)
    message = str(error.value)
    assert "\n" not in message
    assert "1 missing: blocks.1.attn.proj.bias" in message
    assert "1 unexpected: blocks.0.attn.q_norm.weight" in message
    wrong = "1 of wrong shape: blocks.0.moe.experts.2.up_proj.weight [64, 17] instead of [64, 16]"
    assert wrong in message


def test_long_lists_are_cut_and_counted():
    state = published("dense")
    for key in list(state)[-10:-1]:
        del state[key]
    state |= {f"extra.{i}": torch.ones(1) for i in range(12)}
    with pytest.raises(CheckpointError, match=r"9 missing: .* and 3 more; .*12 unexpected: .* and 6 more"):
        from_published(state, DENSE)


@pytest.mark.parametrize(("kind", "other"), [("dense", "swiglu"), ("swiglu", "gelu"), ("gelu", "dense")])
def test_weights_of_another_architecture_are_refused_both_ways(kind, other):
    with pytest.raises(CheckpointError, match="published timm layout"):
        from_published(published(kind), SPECS[other])
    with pytest.raises(CheckpointError, match="dsmoe layout"):
        to_published(model(SPECS[kind]).state_dict(), SPECS[other], input_size=SIDE)


def test_an_expert_too_many_is_unexpected():
    fewer = dataclasses.replace(SWIGLU, num_experts=2)
    with pytest.raises(CheckpointError, match=r"unexpected: blocks\.0\.moe\.experts\.2\.gate_proj\.weight"):
        from_published(published("swiglu"), fewer)


def test_exported_position_embedding_is_the_formula_to_the_last_bit():
    exported = to_published(model(DENSE).bfloat16().state_dict(), DENSE, input_size=SIDE)["pos_embed"]
    assert exported.dtype == torch.float32
    assert torch.equal(exported, sincos())
    assert torch.equal(exported, model(DENSE).pos_embed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_position_embedding_of_a_shortened_checkpoint_is_accepted(dtype):
    from_published(published("dense") | {"pos_embed": sincos().to(dtype)}, DENSE)


@pytest.mark.parametrize(
    "table",
    [sincos(h_first=True), sincos(scale=0.5), sincos() + 2e-5, sincos() * float("nan")],
    ids=["row first", "rescaled grid", "learned a little", "nan"],
)
def test_foreign_position_embedding_is_refused(table):
    with pytest.raises(CheckpointError, match="pos_embed differs"):
        from_published(published("dense") | {"pos_embed": table}, DENSE)


def test_position_embedding_of_no_square_is_refused():
    with pytest.raises(CheckpointError, match="15 tokens"):
        from_published(published("dense") | {"pos_embed": sincos()[:, :15]}, DENSE)


def test_experts_of_mixed_dtype_are_refused():
    state = published("gelu")
    state["blocks.1.moe.experts.0.fc2.bias"] = state["blocks.1.moe.experts.0.fc2.bias"].half()
    with pytest.raises(CheckpointError, match=r"blocks\.1\.moe\.experts\.\*\.fc2\.bias mixes"):
        from_published(state, GELU)
