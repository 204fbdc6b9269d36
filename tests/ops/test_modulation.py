"""Adaptive layer norm against numpy and against its own definition in wider precision."""

import numpy as np
import torch

from dsmoe import ops


def draw(dtype=torch.float64, b=3, t=5, d=8):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(b, t, d, generator=g, dtype=torch.float64) * 4 + 2
    shift, scale = torch.randn(2, b, d, generator=g, dtype=torch.float64)
    return x.to(dtype), shift.to(dtype), scale.to(dtype)


def test_against_numpy():
    x, shift, scale = draw()
    a = x.numpy()
    normed = (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6)
    expected = normed * (1 + scale.numpy()[:, None]) + shift.numpy()[:, None]
    np.testing.assert_allclose(ops.modulate(x, shift, scale), expected, rtol=1e-12, atol=1e-12)


def test_epsilon_matters_for_nearly_constant_tokens():
    x = torch.tensor([[[1.0, 1.0 + 2e-3, 1.0, 1.0 + 2e-3]]], dtype=torch.float64)  # variance 1e-6
    out = ops.modulate(x, torch.zeros(1, 4).double(), torch.zeros(1, 4).double())
    np.testing.assert_allclose(out.abs().numpy(), np.sqrt(0.5), rtol=1e-9)


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    x, shift, scale = draw(torch.bfloat16)
    got = ops.modulate(x, shift, scale)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, ops.modulate(x.float(), shift.float(), scale.float()).bfloat16())
    # bfloat16 tokens with float32 conditioning keep the conditioning's precision.
    fine = torch.tensor(1 / 3).expand(3, 8)
    assert torch.equal(ops.modulate(x, fine, fine), ops.modulate(x.float(), fine, fine).bfloat16())


def test_gradcheck():
    inputs = tuple(t.requires_grad_() for t in draw(b=2, t=3, d=4))
    assert torch.autograd.gradcheck(ops.modulate, inputs)


def test_strided_tokens():
    x, shift, scale = draw()
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(ops.modulate(strided, shift, scale), ops.modulate(x, shift, scale))


def test_compiles_without_a_graph_break():
    compiled = torch.compile(ops.modulate, fullgraph=True, backend="aot_eager")
    inputs = draw(torch.float32)
    torch.testing.assert_close(compiled(*inputs), ops.modulate(*inputs))
