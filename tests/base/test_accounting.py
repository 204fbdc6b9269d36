"""Analytic counts against the papers' tables, hand-counted sizes and the model itself."""

import math
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dsmoe.base.accounting import count_macs, count_parameters, visiting_all_experts
from dsmoe.base.presets import PRESETS, ModelSpec, preset
from dsmoe.models.dit import DiT

IMAGENET = {"channels": 4, "num_classes": 1000, "learn_sigma": True}
TINY = ModelSpec(depth=1, dim=8, heads=2, patch=2)
TINY_MOE = ModelSpec(depth=1, dim=8, heads=2, patch=2, num_experts=4, top_k=1, shared_ratio=2.0)

# (total, active a token) as printed: paper tables 1 and 2, then contracts 2.2, 2.3 and 3; latents of 256 pixels.
PRINTED_PARAMETERS = [
    ("a1", "14.8M", None),
    ("a2", "77.2M", None),
    ("a3", "215M", None),
    ("a4", "458M", None),
    ("a5", "1.2B", None),
    ("a6", "1.9B", None),
    ("S/2-8E2A", "199M", "71M"),
    ("S/2-16E2A", "369M", "71M"),
    ("L/2-8E2A", "2.8B", "1.0B"),
    ("S/2", "33.0M", None),
    ("B/2", "130.5M", None),
    ("L/2", "458.1M", None),
    ("XL/2", "675.1M", None),
    ("XL/4", "675M", None),
    ("XL/8", "675M", None),
    ("a3", "215.5M", None),
    ("a5", "1199M", None),
    ("a6", "1863M", None),
    ("S/2-8E2A", "199M", "72M"),
    ("S/2-16E2A", "369M", "72M"),
    ("B/2-8E2A", "796M", "286M"),
    ("L/2-8E2A", "2.82B", "1.01B"),
    ("XL/2-8E2A", "4.17B", "1.49B"),
    ("G/2-16E2A", "16.5B", "3.18B"),
    ("XL-8E2A", "2.76B", "0.97B"),
]
# Printed without rounding up: 215.54, 71.91, 71.94 and 675.68 million.
CUT_OFF = {("a3", "215M"), ("S/2-8E2A", "71M"), ("S/2-16E2A", "71M"), ("XL/8", "675M")}

# GMACs of one forward pass; side in pixels (the latent is an eighth), half of the last printed digit.
PUBLISHED_MACS = [
    ("XL/2", 256, 118.6, 0.05),
    ("XL/2", 512, 524.5, 0.05),
    ("XL/4", 256, 29.0, 0.05),
    ("XL/8", 256, 7.39, 0.005),
    ("S/2", 256, 6.06, 0.005),
    ("B/2", 256, 23.0, 0.05),
    ("L/2", 256, 80.7, 0.05),
    ("a1", 256, 2.83, 0.005),
    ("a2", 256, 14.0, 0.05),
    ("a3", 256, 38.3, 0.05),
    ("a4", 256, 80.7, 0.05),
    ("a5", 256, 209, 0.5),
    ("a6", 256, 323.8, 0.05),
    ("S/2-8E2A", 256, 16.0, 0.05),
    ("L/2-8E2A", 256, 222.5, 0.05),
    ("XL/2-8E2A", 256, 328, 0.5),
    ("G/2-16E2A", 256, 698, 0.5),
    ("XL-8E2A", 512, 829, 0.5),
]


def on_meta(spec, **sizes):
    arguments = {"input_size": 32, "in_channels": 4, "num_classes": 1000, "learn_sigma": True}
    with torch.device("meta"):
        return DiT(spec, **(arguments | sizes))


def total_and_active(model):
    """Of a built model: the position embedding counts, and of E experts a token visits k."""
    routed = sum(p.numel() for name, p in model.named_parameters() if ".moe.experts." in name)
    total = sum(p.numel() for p in model.parameters()) + model.pos_embed.numel()
    idle = routed * (model.spec.num_experts - model.spec.top_k) // model.spec.num_experts if routed else 0
    return total, total - idle


def as_printed(name, text, count):
    """`count` with the unit and the decimals of `text`."""
    number, unit = text[:-1], {"M": 1e6, "B": 1e9}[text[-1]]
    decimals = len(number.partition(".")[2])
    scale = 10**decimals
    value = math.floor(count / unit * scale) / scale if (name, text) in CUT_OFF else count / unit
    return f"{value:.{decimals}f}{text[-1]}"


@pytest.mark.parametrize(("name", "total", "active"), PRINTED_PARAMETERS)
def test_built_models_have_the_printed_number_of_parameters(name, total, active):
    built = total_and_active(on_meta(preset(name)))
    assert as_printed(name, total, built[0]) == total
    if active:
        assert as_printed(name, active, built[1]) == active
    else:
        assert built[1] == built[0]


def test_position_embedding_explains_the_table_entry_at_512_pixels():
    """DiT's tables count it: XL/2 has 675.1 M at 256 pixels and 676.0 M at 512."""
    small = count_parameters(preset("XL/2"), input_size=32, **IMAGENET)
    large = count_parameters(preset("XL/2"), input_size=64, **IMAGENET)
    assert large.total / 1e6 == pytest.approx(676.0, abs=0.05)
    assert large.total - small.total == (1024 - 256) * 1152
    assert large.trained == small.trained == small.total - 256 * 1152


def test_tiny_model_counted_by_hand():
    position, patch, time, label = 4 * 8, 8 * 12 + 8, 256 * 8 + 8 + 64 + 8, 11 * 8
    attention, adaln, mlp = 3 * 64 + 24 + 64 + 8, 6 * 64 + 48, 8 * 32 + 32 + 32 * 8 + 8
    final = 2 * 64 + 16 + 24 * 8 + 24
    hand = position + patch + time + label + attention + adaln + mlp + final
    arguments = {"channels": 3, "num_classes": 10, "input_size": 4, "learn_sigma": True}
    assert count_parameters(TINY, **arguments).total == hand
    assert count_parameters(TINY, **arguments, null_class=False).total == hand - 8
    arguments["learn_sigma"] = False
    assert count_parameters(TINY, **arguments).total == hand - 12 * 8 - 12


def test_tiny_macs_counted_by_hand():
    macs = count_macs(TINY_MOE, channels=3, input_size=4, learn_sigma=False)
    assert macs.by_component() == {
        "patch_embed": 4 * 12 * 8,
        "timestep": 256 * 8 + 8 * 8,
        "modulation": 6 * 64 + 2 * 64,
        "projections": 4 * 4 * 64,
        "attention": 2 * 4 * 4 * 8,
        "mlp": 0,
        "router": 4 * 4 * 8,
        "experts": 4 * 1 * 3 * 8 * 32,
        "shared_expert": 4 * 3 * 8 * 16,
        "output": 4 * 8 * 12,
    }
    assert macs.total == sum(macs.by_component().values())


def test_idle_experts_cost_parameters_but_no_expert_macs():
    few, many = preset("S/2-8E2A"), preset("S/2-16E2A")
    a, b = (count_macs(s, channels=4, input_size=32, learn_sigma=True) for s in (few, many))
    assert b.experts == a.experts
    assert b.router == 2 * a.router
    p, q = (count_parameters(s, input_size=32, **IMAGENET) for s in (few, many))
    assert q.routed == 2 * p.routed
    assert q.active - p.active == 12 * 8 * 384


@pytest.mark.parametrize(("name", "pixels", "gmacs", "rounding"), PUBLISHED_MACS)
def test_macs_match_the_published_tables(name, pixels, gmacs, rounding):
    macs = count_macs(preset(name), channels=4, input_size=pixels // 8, learn_sigma=True)
    assert macs.total / 1e9 == pytest.approx(gmacs, abs=rounding)


@pytest.mark.parametrize("name", PRESETS)
def test_counts_equal_the_model_built_on_the_meta_device(name):
    model = on_meta(PRESETS[name])
    count = count_parameters(PRESETS[name], input_size=32, **IMAGENET)
    assert total_and_active(model) == (count.total, count.active)
    assert sum(p.numel() for p in model.parameters()) == count.trained
    assert sum(p.numel() for n, p in model.named_parameters() if ".moe.experts." in n) == count.routed


@pytest.mark.parametrize("name", ["nano", "nano-4E2A"])
def test_head_norms_add_two_vectors_of_a_head_twice_a_block(name):
    plain, normed = preset(name), preset(name, qk_norm=True)
    counts = [count_parameters(spec, input_size=8, **IMAGENET) for spec in (plain, normed)]
    assert counts[1].total - counts[0].total == counts[1].active - counts[0].active == 4 * 2 * 2 * 32
    assert counts[1].total == total_and_active(on_meta(normed, input_size=8))[0]
    macs = [count_macs(spec, channels=4, input_size=8, learn_sigma=True) for spec in (plain, normed)]
    assert macs[0] == macs[1]


def test_visiting_all_experts_changes_nothing_but_top_k():
    spec = preset("S/2-16E2A")
    assert visiting_all_experts(spec) == preset("S/2-16E2A", top_k=16)
    assert visiting_all_experts(preset("S/2")) == preset("S/2")


def test_macs_equal_torch_flop_counter():
    """torch counts the matrix products that really run in a dense model (two operations a MAC)."""
    spec = preset("nano")
    model = DiT(spec, input_size=8, in_channels=4, num_classes=10, learn_sigma=True)
    # Only attention's plain backend is made of products the counter knows on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    expected = count_macs(spec, channels=4, input_size=8, learn_sigma=True).total
    assert counter.get_total_flops() == 2 * expected


def test_accounting_does_not_import_torch(repo_root):
    code = "import sys, dsmoe.base.accounting; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=repo_root, check=True, timeout=60)
