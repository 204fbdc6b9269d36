"""Presets against the published tables, and the errors a wrong architecture gives."""

import dataclasses

import pytest

from dsmoe.base.errors import ConfigError
from dsmoe.base.presets import PRESETS, ModelSpec, preset

# name: (depth, dim, heads, patch, routed experts, top_k), from the paper's tables 1 and 2 and DiT's table 1.
TABLE = {
    "a1": (12, 256, 16, 2, 0, 2),
    "a2": (16, 512, 16, 2, 0, 2),
    "a3": (20, 768, 16, 2, 0, 2),
    "a4": (24, 1024, 16, 2, 0, 2),
    "a5": (28, 1536, 16, 2, 0, 2),
    "a6": (32, 1792, 16, 2, 0, 2),
    "S/2": (12, 384, 6, 2, 0, 2),
    "B/4": (12, 768, 12, 4, 0, 2),
    "L/8": (24, 1024, 16, 8, 0, 2),
    "XL/2": (28, 1152, 16, 2, 0, 2),
    "S/2-8E2A": (12, 384, 6, 2, 8, 2),
    "S/2-16E2A": (12, 384, 6, 2, 16, 2),
    "B/2-8E2A": (12, 768, 12, 2, 8, 2),
    "L/2-8E2A": (24, 1024, 16, 2, 8, 2),
    "XL/2-8E2A": (28, 1152, 16, 2, 8, 2),
    "G/2-16E2A": (40, 1408, 16, 2, 16, 2),
    "XL-8E2A": (28, 1152, 16, 2, 8, 2),
}


@pytest.mark.parametrize("name", TABLE)
def test_preset_has_the_published_shape(name):
    spec = preset(name)
    got = (spec.depth, spec.dim, spec.heads, spec.patch, spec.num_experts, spec.top_k)
    assert got == TABLE[name]
    assert spec.mlp_hidden == 4 * spec.dim
    assert spec.is_moe == name.endswith("2A")


def test_published_experts_are_swiglu_with_shared_ones_and_upcycled_experts_are_gelu_without():
    moe, upcycled = preset("S/2-8E2A"), preset("XL-8E2A")
    assert (moe.expert_kind, moe.shared_hidden, moe.renormalize) == ("swiglu", 2 * 384, False)
    assert (upcycled.expert_kind, upcycled.shared_hidden, upcycled.renormalize) == ("gelu", 0, False)


def test_only_the_released_xl_and_g_have_head_norms():
    """Contracts 2.2: q_norm and k_norm stand in the keys of XL and G only; 2.3: none in the generalist."""
    assert {name for name, spec in PRESETS.items() if spec.qk_norm} == {"XL/2-8E2A", "G/2-16E2A"}
    assert (preset("XL/2-8E2A").head_dim, preset("G/2-16E2A").head_dim) == (72, 88)


def test_every_dit_size_exists_with_every_patch():
    assert {f"{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)} <= set(PRESETS)


def test_fields_can_be_replaced_and_the_table_stays():
    assert preset("nano-4E2A", renormalize=True).renormalize
    assert not PRESETS["nano-4E2A"].renormalize
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["nano"].depth = 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, ("heads 5", "dim 128")),
        ({"dim": 130, "heads": 1}, ("dim is 130", "multiple of 4")),
        ({"depth": 0}, ("depth is 0", "at least 1")),
        ({"num_experts": 2, "top_k": 3}, ("top_k 3", "num_experts 2")),
        ({"num_experts": -1}, ("num_experts is -1",)),
        ({"mlp_ratio": 0.0}, ("mlp_ratio is 0.0",)),
        ({"expert_kind": "relu"}, ("'relu'", "swiglu", "gelu")),
        ({"detph": 3}, ("'detph'", "'depth'")),
    ],
)
def test_impossible_architectures_are_named_in_one_line(changes, words):
    with pytest.raises(ConfigError) as error:
        preset("nano", **changes)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_unknown_preset_offers_close_names():
    with pytest.raises(ConfigError, match=r"'XL/2-8E2'.*Did you mean.*'XL/2-8E2A'"):
        preset("XL/2-8E2")


def test_a_dense_model_ignores_top_k():
    assert ModelSpec(depth=1, dim=8, heads=1, top_k=5).is_moe is False
