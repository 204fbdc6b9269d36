"""Grouped matrix product against a numpy loop, for values and gradients."""

import numpy as np
import pytest
import torch

from dsmoe import ops
from dsmoe.ops.reference import grouped

# counts per expert, K, M: odd sizes, empty experts, everything in one, nothing at all
CASES = [
    ([3, 0, 5, 1], 6, 5),
    ([0, 0, 7, 0], 8, 8),
    ([4], 3, 2),
    ([0, 0], 4, 6),
    ([2, 2, 2, 2, 2, 2, 2, 3], 16, 32),
]


def draw(counts, k, m, dtype=torch.float64, transposed=False):
    g = torch.Generator().manual_seed(sum(counts) + k)
    x = torch.randn(sum(counts), k, generator=g, dtype=torch.float64).to(dtype)
    shape = (len(counts), m, k) if transposed else (len(counts), k, m)
    return x, torch.randn(shape, generator=g, dtype=torch.float64).to(dtype), torch.tensor(counts)


def oracle(x, w, counts, grad):
    """y, dx, dw of sum(y * grad) by loops over rows."""
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    r = 0
    for e, count in enumerate(counts):
        for _ in range(count):
            y[r] = x[r] @ w[e]
            dx[r] = w[e] @ grad[r]
            dw[e] += np.outer(x[r], grad[r])
            r += 1
    return y, dx, dw


@pytest.mark.parametrize(("counts", "k", "m"), CASES)
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_against_numpy(counts, k, m, transposed):
    x, w, c = draw(counts, k, m, transposed=transposed)
    grad = torch.randn(len(x), m, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = w.mT if transposed else w
    expected_y, expected_dx, expected_dw = oracle(x.numpy(), plain.numpy(), counts, grad.numpy())
    x.requires_grad_()
    w.requires_grad_()
    y = ops.grouped_mm(x, w, c, transposed=transposed)
    y.backward(grad)
    np.testing.assert_allclose(y.detach(), expected_y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(x.grad, expected_dx, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(w.grad.mT if transposed else w.grad, expected_dw, rtol=1e-12, atol=1e-12)
    assert w.grad.is_contiguous()


def test_gradcheck():
    x, w, c = draw([2, 0, 3], 3, 4)
    assert torch.autograd.gradcheck(lambda x, w: ops.grouped_mm(x, w, c), (x.requires_grad_(), w.requires_grad_()))


def test_experts_without_tokens_get_a_zero_gradient_not_none():
    x, w, c = draw([0, 4, 0], 8, 8, torch.float32)
    w.requires_grad_()
    ops.grouped_mm(x, w, c).square().sum().backward()
    assert w.grad[[0, 2]].abs().max() == 0
    assert w.grad[1].abs().min() > 0


def test_expanded_gradients_and_strided_rows():
    _, w, c = draw([3, 2], 8, 8, torch.float32)
    w.requires_grad_()
    wide = torch.randn(5, 16)
    y = ops.grouped_mm(wide[:, ::2].requires_grad_(), w, c)
    y.sum().backward()  # hands down a gradient of stride 0
    expected = torch.stack([wide[:3, ::2].sum(0), wide[3:, ::2].sum(0)])[..., None].expand_as(w)
    torch.testing.assert_close(w.grad, expected)


def test_frozen_inputs_cost_no_gradient():
    x, w, c = draw([3, 2], 4, 4, torch.float32)
    ops.grouped_mm(x.requires_grad_(), w, c).sum().backward()
    assert x.grad is not None
    assert w.grad is None


def test_the_parameter_itself_is_saved_for_backward():
    """A saved view would keep a gathered ZeRO-3 weight in memory until backward."""
    x, w, c = draw([3, 2], 4, 4, torch.float32, transposed=True)
    w.requires_grad_()
    out = ops.grouped_mm(x, w, c, transposed=True)  # torch 2.11 frees what is saved with the output
    assert any(t is w for t in out.grad_fn.saved_tensors)


def test_mixed_dtypes_are_refused():
    x, w, c = draw([3, 2], 4, 4, torch.float32)
    with pytest.raises(AssertionError, match="bfloat16"):
        ops.grouped_mm(x.bfloat16(), w, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_library_path_agrees_with_the_loop(monkeypatch, dtype, transposed):
    """torch._grouped_mm serves GPUs; its CPU kernel lets the calls be checked here. Equal up to summation order."""
    counts, k, m = [5, 0, 40, 3], 32, 48
    results = []
    for library in (False, True):
        monkeypatch.setattr(grouped, "_library_takes", lambda *operands, library=library: library)
        x, w, c = draw(counts, k, m, dtype, transposed)
        y = ops.grouped_mm(x.requires_grad_(), w.requires_grad_(), c, transposed=transposed)
        y.sum().backward()  # an expanded gradient, which the library itself would refuse
        results.append((y.detach(), x.grad, w.grad))
    for loop, library in zip(*results, strict=True):
        torch.testing.assert_close(library, loop)
    assert results[1][2][1].abs().max() == 0


def test_bfloat16_error_is_that_of_a_plain_loop():
    x, w, c = draw([30, 50, 20], 64, 48, torch.bfloat16)
    truth = oracle(x.double().numpy(), w.double().numpy(), c.tolist(), np.zeros((100, 48)))[0]
    plain = torch.cat([rows @ m for rows, m in zip(x.split(c.tolist()), w, strict=True)])
    error = np.abs(ops.grouped_mm(x, w, c).double().numpy() - truth).max()
    assert error <= 2 * np.abs(plain.double().numpy() - truth).max()
