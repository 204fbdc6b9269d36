"""Multi-resolution noise against the published loop, one sample at a time, with torch's own bilinear resizing."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsmoe.diffusion.noise import MAX_LEVELS, level_sizes, multi_resolution

SHAPES = [(8, 8), (32, 32), (64, 64), (11, 24), (4, 40), (5, 3), (1, 4), (2, 2)]


def numbers(height, width, batch=12, channels=3, seed=0):
    """(base, levels, ratio, strength) as a caller would draw them."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(batch, channels, height, width, generator=generator)
    levels = [torch.randn(batch, channels, h, w, generator=generator) for h, w in level_sizes(height, width)]
    ratio = 2 + 2 * torch.rand(batch, len(levels), generator=generator)
    return base, levels, ratio, torch.linspace(0, 0.9, batch)


def published(base, levels, ratio, strength):
    """Contracts 4.5 for one sample [C,h,w] in fp64, its std its own: sizes in plain Python, resizing by torch."""
    height, width = base.shape[1:]
    total, h, w = base.double(), height, width
    for i in range(10):
        h, w = max(1, int(h / ratio[i].item() ** i)), max(1, int(w / ratio[i].item() ** i))
        grid = levels[i][None, :, :h, :w].double()
        total = total + F.interpolate(grid, size=(height, width), mode="bilinear")[0] * strength.item() ** i
        if h == 1 or w == 1:
            break
    return total / total.std()


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_equals_the_published_loop_for_each_sample(height, width):
    drawn = numbers(height, width)
    got = multi_resolution(*drawn)
    base, levels, ratio, strength = drawn
    expected = torch.stack(
        [published(base[b], [x[b] for x in levels], ratio[b], strength[b]) for b in range(len(base))]
    )
    assert got.dtype == torch.float32
    # fp32 sums and interpolation weights, the latter 2^-24 of a line number off: measured 1.3e-6 at most.
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=6.5e-6)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_every_sample_has_unit_variance(height, width):
    got = multi_resolution(*numbers(height, width))
    np.testing.assert_allclose(got.flatten(1).numpy().astype(np.float64).var(1, ddof=1), 1, rtol=1e-5)


@pytest.mark.parametrize(("height", "width"), [*SHAPES, (128, 128), (4096, 4096), (1, 1)])
def test_levels_are_as_many_and_as_large_as_any_ratio_needs(height, width):
    sizes = level_sizes(height, width)
    assert sizes[0] == (height, width)
    assert len(sizes) <= MAX_LEVELS
    for r in (2.0, 2.0000001, 2.5, 3.0, 3.9999998):
        h, w = height, width
        for i in range(10):
            h, w = max(1, int(h / r**i)), max(1, int(w / r**i))
            assert h <= sizes[i][0]
            assert w <= sizes[i][1]
            if r == 2:
                assert (h, w) == sizes[i]
            if h == 1 or w == 1:
                break


def test_samples_do_not_touch_each_other():
    base, levels, ratio, strength = numbers(32, 32)
    whole = multi_resolution(base, levels, ratio, strength)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for size in (1, 5):
        parts = [
            multi_resolution(base[rows], [x[rows] for x in levels], ratio[rows], strength[rows])
            for rows in order.split(size)
        ]
        assert torch.equal(torch.cat(parts), whole[order])


def test_strength_zero_is_white_and_strength_adds_low_frequencies():
    """Share of the variance in the means of 8 x 8 tiles: 1/64 for white noise; above it grows with strength."""
    shares = []
    for strength in (0.0, 0.3, 0.6, 0.9):
        base, levels, ratio, _ = numbers(32, 32, batch=400, channels=4)
        noise = multi_resolution(base, levels, ratio, torch.full((400,), strength))
        shares.append(F.avg_pool2d(noise, 8).square().mean().item())
    # 25,600 tile means: 1/64 to sqrt(2 / 25600) = 0.9 %, three standard deviations.
    assert shares[0] == pytest.approx(1 / 64, rel=0.027)
    assert all(b > 1.5 * a for a, b in itertools.pairwise(shares)), shares


def test_strength_zero_is_base_and_first_level_alone():
    base, levels, ratio, strength = numbers(8, 8)
    got = multi_resolution(base, levels, ratio, torch.zeros_like(strength))
    total = base + levels[0]
    torch.testing.assert_close(got, total / total.flatten(1).std(1).view(-1, 1, 1, 1), rtol=1e-6, atol=0)
    assert math.prod(levels[0].shape) == base.numel()
