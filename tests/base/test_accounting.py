"""Analytic counts against the papers' tables, hand-counted sizes and the model itself."""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dsmoe.base.accounting import count_macs, count_parameters
from dsmoe.base.presets import PRESETS, ModelSpec, preset
from dsmoe.models.dit import DiT

IMAGENET = {"channels": 4, "num_classes": 1000, "learn_sigma": True}
TINY = ModelSpec(depth=1, dim=8, heads=2, patch=2)
TINY_MOE = ModelSpec(depth=1, dim=8, heads=2, patch=2, num_experts=4, top_k=1, shared_ratio=2.0)

# Totals and active counts printed in the papers, in millions, and half of the last printed digit.
PUBLISHED_PARAMETERS = {
    "a1": (14.8, None, 0.05),
    "a2": (77.2, None, 0.05),
    "a3": (215.5, None, 0.05),
    "a4": (458.1, None, 0.05),
    "a5": (1199, None, 0.5),
    "a6": (1863, None, 0.5),
    "S/2": (33.0, None, 0.05),
    "B/2": (130.5, None, 0.05),
    "L/2": (458.1, None, 0.05),
    "XL/2": (675.1, None, 0.05),
    "S/2-8E2A": (199, 71.5, 0.55),
    "S/2-16E2A": (369, 71.7, 0.75),
    "B/2-8E2A": (796, 286, 0.5),
    "L/2-8E2A": (2820, 1010, 5),
    "XL/2-8E2A": (4170, 1490, 5),
    "XL-8E2A": (2760, 970, 5),
    "G/2-16E2A": (16500, 3180, 50),
}

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


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameters_match_the_published_tables(name):
    total, active, rounding = PUBLISHED_PARAMETERS[name]
    count = count_parameters(preset(name), input_size=32, **IMAGENET)
    assert count.total / 1e6 == pytest.approx(total, abs=rounding)
    if active is None:
        assert count.active == count.total
        assert count.routed == 0
    else:
        assert count.active / 1e6 == pytest.approx(active, abs=rounding)


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
    spec = PRESETS[name]
    with torch.device("meta"):
        model = DiT(spec, input_size=32, in_channels=4, num_classes=1000, learn_sigma=True)
    count = count_parameters(spec, input_size=32, **IMAGENET)
    assert sum(p.numel() for p in model.parameters()) == count.trained
    assert count.trained + model.pos_embed.numel() == count.total
    routed = sum(p.numel() for n, p in model.named_parameters() if ".moe.experts." in n)
    assert routed == count.routed
    if spec.is_moe:
        assert count.active == count.total - routed + routed * spec.top_k // spec.num_experts


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
