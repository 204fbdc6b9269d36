"""The gradient norm against fp64, where torch's own in fp32 is far off."""

import pytest
import torch

from dsmoe.training.gradient_norm import ROW, l2_norm

# n numbers, equal on purpose: a running sum then rounds the same way at every step.
SIZES = [1, 7, ROW - 1, ROW, ROW + 1, 3_000_001]


def gradients(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    made = []
    for size in SIZES:
        values = torch.randn(size, generator=generator) if kind == "normal" else torch.full((size,), 0.123)
        made.append(values.to(dtype))
    return made


@pytest.mark.parametrize("kind", ["normal", "equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_that_of_fp64_to_rounding(kind, dtype):
    """A row's fp32 sum of squares is off by at most ROW x 2^-24 = 6e-5 in the worst case, by 2^-24 x sqrt(ROW) = 2e-6
    in the usual one; its root by half of that."""
    made = gradients(kind, dtype)
    true = torch.cat([g.double() for g in made]).norm()
    assert l2_norm(made).item() == pytest.approx(true.item(), rel=1e-6)


def test_torchs_own_is_worse():
    """Why this exists: were torch's CPU norm as good, it should be used."""
    equal = torch.full((3_000_000,), 0.123)
    true = equal.double().norm().item()
    plain = abs(torch.linalg.vector_norm(equal).item() / true - 1)
    assert abs(l2_norm([equal]).item() / true - 1) < plain / 100


def test_shapes_views_and_what_is_not_finite():
    matrix = torch.arange(6.0).view(2, 3)
    assert l2_norm([matrix.t(), matrix[:, 1]]).item() == pytest.approx((55 + 17) ** 0.5)
    assert l2_norm([]).item() == 0
    assert l2_norm([torch.ones(0)]).item() == 0
    assert l2_norm([torch.ones(5), torch.tensor([float("nan")])]).isnan()
    assert l2_norm([torch.full((2 * ROW,), float("inf"))]).isinf()
