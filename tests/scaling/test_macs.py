"""Counted MACs against the arithmetic and the published numbers, what torch's own counter misses, and the command."""

import dataclasses
import functools
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsmoe import __main__ as command
from dsmoe import ops
from dsmoe.base.errors import ConfigError
from dsmoe.base.presets import PRESETS, ModelSpec
from dsmoe.codec.build import NAMES
from dsmoe.codec.kl import KLCodec
from dsmoe.codec.taesd import TaesdCodec
from dsmoe.ops.reference import grouped
from dsmoe.scaling import macs
from dsmoe.scaling.macs import SizedModel, counted_forward, counted_training, grouped_flop, on_meta, sized_model

SIZES = [(name, 256) for name in PRESETS] + [("XL/2", 512), ("XL-8E2A", 512)]

# GMACs as printed in contracts 3 (whose "Gflops" they are in the DiT paper).
PRINTED = [
    ("S/2", 256, "6.06"),
    ("B/2", 256, "23.0"),
    ("L/2", 256, "80.7"),
    ("XL/2", 256, "118.6"),
    ("XL/2", 512, "524.5"),
    ("XL/4", 256, "29.0"),
    ("XL/8", 256, "7.39"),
    ("a1", 256, "2.83"),
    ("a2", 256, "14.0"),
    ("a3", 256, "38.3"),
    ("a4", 256, "80.7"),
    ("a5", 256, "209"),
    ("a6", 256, "323.8"),
    ("S/2-8E2A", 256, "16.0"),
    ("L/2-8E2A", 256, "222.5"),
    ("XL/2-8E2A", 256, "328"),
    ("G/2-16E2A", 256, "698"),
    ("XL-8E2A", 512, "829"),
]


@functools.cache
def counted(name, pixels):
    """By component, in the model on the meta device."""
    return counted_forward(on_meta(sized_model(name, pixels)))


def shortened(name, depth):
    """The preset with so many blocks at most: they are alike, and counting all of them takes its time."""
    spec = PRESETS[name]
    return SizedModel(name=name, spec=dataclasses.replace(spec, depth=min(spec.depth, depth)))


@pytest.mark.parametrize(("name", "pixels"), SIZES)
def test_counted_macs_equal_the_arithmetic(name, pixels):
    """0.1 % is asked; both count the same products, so every component is the same integer."""
    assert counted(name, pixels) == sized_model(name, pixels).macs()


@pytest.mark.parametrize("name", [name for name, spec in PRESETS.items() if spec.is_moe])
def test_counted_macs_of_all_experts_equal_the_arithmetic(name):
    sized = shortened(name, 4)
    assert counted_forward(on_meta(sized, all_experts=True)) == sized.macs(all_experts=True)


@pytest.mark.parametrize(("name", "pixels", "printed"), PRINTED)
def test_counted_macs_are_the_published_ones(name, pixels, printed):
    decimals = len(printed.partition(".")[2])
    assert f"{counted(name, pixels).total / 1e9:.{decimals}f}" == printed


def test_all_experts_cost_what_the_experts_cost_a_token_times_their_number():
    active, every = (sized_model("S/2-16E2A").macs(all_experts=flag) for flag in (False, True))
    assert every.experts == 8 * active.experts
    assert every.total - active.total == 7 * active.experts
    dense = sized_model("S/2")
    assert dense.macs(all_experts=True) == dense.macs()


# ----------------------------------------------------------------------------------------------------------
# Forward and backward.


@pytest.mark.parametrize("name", ["S/2", "XL/2", "S/2-8E2A", "XL-8E2A"])
def test_training_costs_three_forward_passes(name):
    """To 0.4 %, and exactly but for what is named here."""
    sized = shortened(name, 8)
    spec, forward = sized.spec, sized.macs()
    training = counted_training(on_meta(sized))
    without_gradient = forward.patch_embed + 256 * spec.dim  # the image and the timestep features
    bias_products = 0
    if spec.expert_kind == "gelu" and spec.is_moe:
        rows = sized.tokens * spec.top_k
        bias_products = spec.depth * spec.num_experts * rows * (spec.mlp_hidden + spec.dim)
    assert training == 3 * forward.total - without_gradient + bias_products
    assert training / forward.total == pytest.approx(3, rel=4e-3)


# ----------------------------------------------------------------------------------------------------------
# Real numbers on a CPU: unbalanced routing, and the two ways of a grouped product.

KINDS = {
    "swiglu": ModelSpec(depth=2, dim=32, heads=2, num_experts=4, shared_ratio=2.0, qk_norm=True),
    "gelu": ModelSpec(depth=2, dim=32, heads=2, num_experts=3, expert_kind="gelu"),  # 3 does not divide the rows
    "dense": ModelSpec(depth=2, dim=32, heads=2),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def small(kind):
    return SizedModel(name=kind, spec=KINDS[kind], resolution=64, num_classes=10)


def scrambled(kind, dtype):
    """On the CPU, its zero layers too with values, so that tokens differ and choose different experts."""
    torch.manual_seed(0)
    model = small(kind).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def by_torch_alone(model):
    """MACs of a forward pass, counted without our formulas."""
    found = FlopCounterMode(display=False)
    with found, torch.no_grad():
        model(*macs._one_image(model))
    return found.get_total_flops() / 2


@pytest.fixture(params=["native", "reference"])
def pieces(request):
    """Experts as one compiled operation, where it is built, or from their pieces."""
    if request.param == "native" and ("moe_ffn", "native") not in [
        (op, used) for op, used, _ in ops.implementations("cpu")
    ]:
        pytest.skip("the compiled operations are not built (make kernels)")
    with nullcontext() if request.param == "native" else ops.use("reference"):
        yield request.param


@every_kind
def test_a_run_on_the_cpu_counts_the_same(kind, pieces):
    model, expected = scrambled(kind, torch.float32), small(kind).macs()
    assert counted_forward(on_meta(small(kind))) == expected
    if pieces == "native":  # one operation for the routed and the shared expert
        expected = dataclasses.replace(expected, experts=expected.experts + expected.shared_expert, shared_expert=0)
    assert counted_forward(model) == expected
    # Of operations of our own torch counts nothing, nor of attention's fused kernel.
    unknown = expected.attention + expected.experts + (expected.router if pieces == "native" else 0)
    assert by_torch_alone(model) == expected.total - unknown


@every_kind
def test_grouped_products_are_counted_once_where_torch_counts_none(kind, monkeypatch):
    """By way of torch's grouped product, which GPUs use in bf16, here on the CPU."""
    monkeypatch.setattr(grouped, "_library_takes", lambda *_: True)
    model, expected = scrambled(kind, torch.bfloat16), small(kind).macs()
    with ops.use("reference"):
        assert counted_forward(model) == expected


@every_kind
def test_the_backward_pass_counts_the_same_in_both_ways(kind, pieces, monkeypatch):
    """Fused attention computes its scores a second time on the way back: half of its forward cost on top."""
    expected = counted_training(on_meta(small(kind))) + small(kind).macs().attention // 2
    if kind == "gelu" and pieces == "native":  # gradients of biases are not products there
        spec, rows = small(kind).spec, small(kind).tokens * small(kind).spec.top_k
        expected -= spec.depth * spec.num_experts * rows * (spec.mlp_hidden + spec.dim)
    assert counted_training(scrambled(kind, torch.float32)) == expected
    monkeypatch.setattr(grouped, "_library_takes", lambda *_: True)
    assert counted_training(scrambled(kind, torch.bfloat16)) == expected


def test_tokens_really_were_unbalanced():
    model = scrambled("swiglu", torch.float32)
    load = model(*macs._one_image(model))[1].load
    assert (load.amax(1) > 1.2 * load.mean(1)).all()


@pytest.mark.parametrize("groups", [[2, 3, 1], [0, 6, 0]])
def test_operations_of_a_grouped_product(groups):
    """Against the sum over groups, each a plain product of 2 * rows * inner * columns operations."""
    rows, inner, columns = sum(groups), 5, 7
    expected = sum(2 * size * inner * columns for size in groups)
    assert grouped_flop(torch.Size((rows, inner)), torch.Size((len(groups), inner, columns))) == expected
    assert grouped_flop(torch.Size((inner, rows)), torch.Size((rows, columns)), out_shape=None) == expected


def test_a_product_outside_every_component_is_noticed():
    with pytest.raises(AssertionError, match="surprise"):
        macs._by_component({"Global": {"mm": 8}, "DiT": {"mm": 8}, "DiT.surprise": {"mm": 8}})


# ----------------------------------------------------------------------------------------------------------
# Names, sizes and the command.


def test_a_recipe_has_its_own_sizes_unless_told_otherwise():
    own = sized_model("quickstart")
    assert (own.resolution, own.input_size, own.num_classes, own.channels) == (64, 8, 16, 4)
    assert own.spec == PRESETS["nano-8E2A"]
    other = sized_model("quickstart", 128, 5)
    assert (other.resolution, other.input_size, other.num_classes) == (128, 16, 5)
    assert (sized_model("photos").num_classes, sized_model("photos").resolution) == (1000, 128)


def test_a_recipe_file_without_codec_or_dropout_is_counted_in_pixels(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: {preset: nano, patch: 4}\ndata: {resolution: 32}\ncodec: {name: none}\n"
        "diffusion: {learn_sigma: false}\nreport: {guidance: 1}\n"
        "train: {images: 512, label_dropout: 0}\n"
    )
    sized = sized_model(str(file))
    assert (sized.name, sized.channels, sized.input_size, sized.tokens) == ("mine", 3, 32, 64)
    assert (sized.learn_sigma, sized.null_class) == (False, False)
    built = on_meta(sized)
    assert sum(p.numel() for p in built.parameters()) == sized.parameters().trained
    assert built.out_channels == 3


def test_latents_have_the_shape_of_every_codec():
    """sd is the one that loads its shape: Stable Diffusion's (contracts 2.1.11, 3). A new codec must be looked at."""
    assert set(NAMES) == {"kl-small", "taesd", "sd", "none"}
    for codec in (KLCodec, TaesdCodec):
        assert (codec.channels, codec.factor) == (macs.LATENT_CHANNELS, macs.LATENT_FACTOR)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("XL/3",), ("'XL/3'", "Did you mean", "'XL/2'")),
        (("quikstart",), ("'quikstart'", "'quickstart'")),
        (("XL/8", 96), ("resolution 96", "multiple of 64", "choose such as 128")),
        (("XL/8", 0), ("resolution 0",)),
        (("nano", None, 0), ("0 classes",)),
        (("no/such.yaml",), ("no/such.yaml", "does not exist")),
    ],
)
def test_impossible_requests_are_named_in_one_line(arguments, words):
    with pytest.raises(ConfigError) as error:
        sized_model(*arguments)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_the_command_shows_components_totals_and_agreement(capsys):
    assert command.main(["macs", "nano-4E2A", "--resolution", "64", "--classes", "10"]) == 0
    shown = capsys.readouterr().out
    sized = sized_model("nano-4E2A", 64, 10)
    forward, every, parameters = sized.macs(), sized.macs(all_experts=True), sized.parameters()
    for value in (parameters.total, parameters.active, parameters.trained):
        assert f"{value:,}" in shown
    cells = {line[:13].strip(): line[13:].split() for line in shown.splitlines()[6:]}
    expected = {k: v for k, v in forward.by_component().items() if v} | {"active": forward.total}
    expected |= {"all experts": every.total}
    assert cells == {name: [f"{value:,}", f"{value:,}", "0.000%"] for name, value in expected.items()}


def test_a_dense_model_has_no_line_about_experts(capsys):
    assert command.main(["macs", "nano", "--resolution", "64"]) == 0
    assert "expert" not in capsys.readouterr().out


def test_the_command_refuses_in_one_line(capsys):
    assert command.main(["macs", "nano", "--resolution", "65"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: resolution 65 of nano")


def test_the_committed_table_is_what_the_command_prints(repo_root, capsys):
    assert command.main(["macs", "all"]) == 0
    text = (repo_root / "docs" / "macs.md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out, "renew it: python -m dsmoe macs all > docs/macs.md"
    assert "| XL/2 | 512 | 676.0 | 676.0 | 524.5 | 524.5 | 3.147 |" in text  # contracts 3


def test_the_table_at_another_resolution_holds_every_preset_once():
    rows = [line for line in macs.table(512).splitlines() if line.startswith("| ")][1:]
    assert [row.split()[1] for row in rows] == list(PRESETS)
    assert {row.split()[3] for row in rows} == {"512"}
