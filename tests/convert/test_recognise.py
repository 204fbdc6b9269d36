"""Weights are known by their content; what is ambiguous, wrong or incomplete is refused in one line that says how."""

import dataclasses

import pytest
import torch
from convert.published import SMALL, shapes, weights

from dsmoe.base.errors import CheckpointError, ConfigError
from dsmoe.base.presets import PRESETS
from dsmoe.convert.conventions import settle
from dsmoe.convert.incoming import Request, take_in
from dsmoe.convert.recognise import Given, recognise

HEADS = {"heads": 2, "top_k": 2}
DIT = Request(stated="dit", heads=2)


def outline(kind):
    return {key: torch.empty(shape, device="meta") for key, shape in shapes(kind).items()}


def take(tmp_path, state, request=DIT):
    torch.save(state, tmp_path / "w.pt")
    return take_in(tmp_path / "w.pt", request)


def refused(tmp_path, state, request=DIT):
    with pytest.raises((CheckpointError, ConfigError)) as error:
        take(tmp_path, state, request)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_dits_keys_alone_are_ambiguous(tmp_path):
    line = refused(tmp_path, weights(SMALL["dit"]), Request(heads=2))
    assert "DiT, fast-DiT and SiT share" in line
    assert "--from dit" in line
    assert "--from sit" in line
    assert take(tmp_path, weights(SMALL["dit"]), Request(heads=2, objective="sit")).plan.recipe.diffusion.is_flow


def test_heads_come_from_a_preset_of_these_shapes_or_must_be_said(tmp_path):
    kind = dataclasses.replace(SMALL["dit"], depth=12, dim=384, heads=6)
    found = recognise(outline(kind), Given())
    assert (found.preset, found.spec.heads) == ("S/2", 6)
    assert "--heads N, or --preset NAME" in refused(tmp_path, weights(SMALL["dit"]), Request(stated="dit"))
    assert "model.heads 3 does not divide" in refused(tmp_path, weights(SMALL["dit"]), Request(stated="dit", heads=3))
    assert "--top-k N" in refused(tmp_path, weights(SMALL["dit-moe-flash"]), Request())


def test_an_upcycled_network_of_a_known_size_has_its_heads(tmp_path):
    """The authors' helper configurations a_2..a_5 with experts (contracts 2.3.13): heads 16, top-2."""
    kind = dataclasses.replace(
        SMALL["generalist"], depth=16, dim=512, heads=16, experts=8, convs=0, inputs=4, rows=1001
    )
    found = recognise(outline(kind), Given())
    assert (found.spec.heads, found.spec.top_k, found.spec.expert_kind, found.preset) == (16, 2, "gelu", "")
    assert any("top_k 2" in note for note in found.notes)


def test_a_preset_is_checked_against_the_shapes():
    kind = dataclasses.replace(SMALL["dit"], depth=12, dim=384, heads=6)
    assert recognise(outline(kind), Given(preset="S/2")).spec == PRESETS["S/2"]
    with pytest.raises(CheckpointError, match=r"not of --preset B/2: dim 384 instead of 768"):
        recognise(outline(kind), Given(preset="B/2"))
    with pytest.raises(ConfigError, match="Did you mean"):
        recognise(outline(kind), Given(preset="S2"))


@pytest.mark.parametrize(
    ("rows", "said", "labels", "null", "about"),
    [
        (1001, None, 1000, True, "ImageNet"),
        (1000, None, 1000, False, "no null label"),
        (1002, None, 1001, True, "one task label"),
        (1005, None, 1004, True, "task labels 1000 to 1003"),
        (17, None, 16, True, "the last one taken for the null label"),
        (17, 17, 17, False, "as --num-classes says"),
    ],
)
def test_label_tables(rows, said, labels, null, about):
    kind = dataclasses.replace(SMALL["dit"], rows=rows)
    found = recognise(outline(kind), Given(heads=2, num_classes=said))
    assert (found.num_classes, found.null_class) == (labels, null)
    assert about in found.notes[-1]


def test_a_number_of_classes_that_the_table_cannot_have_is_refused():
    with pytest.raises(ConfigError, match="give 1000 or 1001"):
        recognise(outline(SMALL["dit"]), Given(heads=2, num_classes=10))


@pytest.mark.parametrize(
    ("inputs", "outputs", "channels", "conditions", "sigma"),
    [(4, 8, 4, 0, True), (4, 4, 4, 0, False), (12, 8, 4, 2, True), (8, 8, 4, 1, True), (8, 4, 4, 1, False),
     (3, 6, 3, 0, True), (16, 32, 16, 0, True), (16, 16, 16, 0, False)],
)  # fmt: skip
def test_latent_channels_and_conditions(inputs, outputs, channels, conditions, sigma):
    kind = dataclasses.replace(SMALL["dit"], inputs=inputs, outputs=outputs)
    found = recognise(outline(kind), Given(heads=2))
    assert (found.channels, found.spec.conditions, found.learn_sigma) == (channels, conditions, sigma)


def test_perception_weights_do_not_show_their_objective(tmp_path):
    state = weights(SMALL["generalist"])
    line = refused(tmp_path, state, Request(**HEADS))
    assert "--objective v" in line
    assert "--objective cosine" in line
    plan = take(tmp_path, state, Request(**HEADS, objective="cosine")).plan
    assert (plan.recipe.diffusion.prediction, plan.recipe.diffusion.schedule) == ("epsilon", "cosine")
    assert (plan.recipe.model.tasks, plan.recipe.model.conditions, plan.model.num_classes) == (4, 2, 1004)
    dense = dataclasses.replace(SMALL["dit"], inputs=12, rows=1005)
    assert "--objective v" in refused(tmp_path, weights(dense), Request(heads=2))
    assert take(tmp_path, weights(dense), Request(heads=2, objective="v")).plan.recipe.model.conditions == 2


def without(*keys):
    return lambda s: {key: value for key, value in s.items() if key not in keys}


BROKEN = {
    "missing": (without("blocks.1.attn.proj.bias"), "1 missing: blocks.1.attn.proj.bias"),
    "no table": (without("y_embedder.embedding_table.weight"), "lack y_embedder.embedding_table.weight"),
    "no position": (without("pos_embed"), "no pos_embed, which published weights hold"),
    "extra": (lambda s: s | {"blocks.0.ls1.gamma": torch.ones(16)}, "1 unexpected: blocks.0.ls1.gamma"),
    "shape": (
        lambda s: s | {"blocks.1.mlp.fc2.weight": torch.ones(16, 63)},
        "of wrong shape: blocks.1.mlp.fc2.weight [16, 63] instead of [16, 64]",
    ),
    "a later block": (lambda s: s | {"blocks.7.attn.qkv.bias": torch.ones(48)}, "missing: blocks.2.attn.qkv.weight"),
    "position": (lambda s: s | {"pos_embed": s["pos_embed"] + 1e-4}, "pos_embed differs from the 2-D sine-cosine"),
    "nothing known": (lambda s: {"conv.weight": torch.ones(3)}, "of no layout that dsmoe knows (conv.weight"),
    "two layouts": (
        lambda s: s | {"blocks.0.attn.Wqkv.weight": torch.ones(48, 16)},
        "of two layouts at once: blocks.0.attn.Wqkv.weight and blocks.0.attn.qkv.weight",
    ),
    "odd output": (lambda s: s | {"final_layer.linear.weight": torch.ones(28, 16)}, "takes 4 channels"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_weights_are_named(case, tmp_path):
    change, message = BROKEN[case]
    state = change(weights(SMALL["dit"]))
    line = refused(tmp_path, state)
    assert message in line


def test_a_missing_convolution_of_a_task_is_named(tmp_path):
    state = weights(SMALL["generalist"])
    for leaf in ("weight", "bias"):
        del state[f"x_embedder.proj.conv_in_2.{leaf}"]
    assert "patch convolutions [1, 3, 4]" in refused(tmp_path, state, Request(**HEADS, objective="v"))


@pytest.mark.parametrize(
    ("name", "stated"), [("dit", "dit-moe-x"), ("dit-moe-timm", "dit"), ("dit-moe-flash", "sit"), ("dit", "diffusers")]
)
def test_a_format_that_these_weights_are_not_is_refused(name, stated, tmp_path):
    line = refused(tmp_path, weights(SMALL[name]), Request(stated=stated, **(HEADS if name != "dit" else {"heads": 2})))
    assert ("Did you mean 'dit-moe'" if stated == "dit-moe-x" else f"--from is {stated}") in line


def test_another_path_than_the_straight_one_is_refused():
    found = recognise(outline(SMALL["dit"]), Given(heads=2))
    with pytest.raises(CheckpointError, match="path GVP to predict noise"):
        settle(found, {"path_type": "GVP", "prediction": "noise"}, None, None)
