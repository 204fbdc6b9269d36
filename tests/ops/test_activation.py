"""Expert activations and biases against their formulas in numpy."""

import numpy as np
import pytest
import torch

from dsmoe import ops


def test_swiglu_and_gelu_formulas():
    g = torch.Generator().manual_seed(0)
    h, up = 3 * torch.randn(40, 7, generator=g).double(), torch.randn(40, 7, generator=g).double()
    x = h.numpy()
    np.testing.assert_allclose(ops.expert_act(h, "swiglu", up), x / (1 + np.exp(-x)) * up.numpy(), rtol=1e-13)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    np.testing.assert_allclose(ops.expert_act(h, "gelu"), 0.5 * x * (1 + np.tanh(inner)), rtol=1e-11, atol=1e-15)


def test_unknown_kind_is_refused():
    with pytest.raises(AssertionError, match="relu"):
        ops.expert_act(torch.zeros(1, 1), "relu")


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 4], [0, 0, 0]])
def test_bias_of_the_own_expert_is_added(counts):
    rows = torch.randn(sum(counts), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bias = torch.arange(15, dtype=torch.float64).view(3, 5)
    expected = [rows[r] + bias[e] for r, e in enumerate(np.repeat(np.arange(3), counts))]
    got = ops.add_expert_bias(rows, bias, torch.tensor(counts))
    assert got.shape == rows.shape
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_bias_gradcheck_with_an_empty_expert():
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(lambda r, b: ops.add_expert_bias(r, b, counts), (rows, bias))
    ops.add_expert_bias(rows, bias, counts).sum().backward()
    assert bias.grad.tolist() == [[2.0] * 3, [0.0] * 3, [3.0] * 3]


def test_bias_gradient_of_bfloat16_is_summed_in_float32():
    """A running bfloat16 sum of ones stops at 256."""
    bias = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    rows = torch.zeros(1500, 1, dtype=torch.bfloat16)
    ops.add_expert_bias(rows, bias, torch.tensor([500, 1000])).sum().backward()
    assert bias.grad.flatten().tolist() == [500, 1000]
