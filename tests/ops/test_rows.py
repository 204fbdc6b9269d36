"""The gather and sum of rows: numpy loops, adjointness, gradients, precision."""

import numpy as np
import pytest
import torch

from dsmoe import ops


def draw(n: int, e: int, k: int, d: int, dtype=torch.float64):
    g = torch.Generator().manual_seed(n + e + k)
    r = ops.route(
        torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randn(e, 4, generator=g).double(), k, False
    )
    x = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    rows = torch.randn(n * k, d, generator=g, dtype=torch.float64).to(dtype)
    return r, x, rows


SIZES = [(9, 4, 2, 5), (6, 3, 1, 4), (5, 8, 4, 3), (0, 4, 2, 5)]


@pytest.mark.parametrize("size", SIZES)
def test_gather_is_sorted_by_expert_and_keeps_token_order(size):
    n, e, k, _ = size
    r, x, _ = draw(*size)
    expected = [x[t] for expert in range(e) for t in range(n) for j in range(k) if r.indices[t, j] == expert]
    got = ops.gather_rows(x, r.order, r.position)
    assert got.shape == (n * k, x.shape[1])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gated", [False, True])
def test_sum_against_numpy(size, gated):
    n, _, k, d = size
    r, _, rows = draw(*size)
    expected = np.zeros((n, d))
    for row, slot in enumerate(r.order.tolist()):
        expected[slot // k] += rows[row].numpy() * (float(r.gates[slot // k, slot % k]) if gated else 1.0)
    got = ops.sum_rows(rows, r.order, r.position, r.gates if gated else None)
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-13)


def test_the_two_are_adjoint():
    r, x, rows = draw(17, 4, 2, 6)
    left = (ops.gather_rows(x, r.order, r.position) * rows).sum()
    right = (x * ops.sum_rows(rows, r.order, r.position)).sum()
    torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)


def test_gradcheck():
    r, x, rows = draw(5, 4, 2, 3)
    x, rows, gates = x.requires_grad_(), rows.requires_grad_(), r.gates.clone().requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x: ops.gather_rows(x, r.order, r.position), (x,))
    assert check(lambda rows: ops.sum_rows(rows, r.order, r.position), (rows,))
    assert check(lambda rows, gates: ops.sum_rows(rows, r.order, r.position, gates), (rows, gates))


def test_bfloat16_rows_are_added_in_float32():
    """256 + 1 is not a bfloat16 number; its terms are."""
    order, position = torch.tensor([0, 1]), torch.tensor([[0, 1]])
    rows = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)
    out = ops.sum_rows(rows, order, position)
    assert out.dtype == torch.float32
    assert out.item() == 257
    gated = ops.sum_rows(rows, order, position, torch.tensor([[1.0, 0.001]]))
    assert gated.item() == torch.tensor(256.0).add(torch.tensor(0.001)).item()


def test_bfloat16_gradients_are_rounded_once():
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    order, position = torch.tensor([0, 1, 2]), torch.tensor([[0, 1, 2]])
    grad = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    ops.gather_rows(x, order, position).backward(grad)
    assert x.grad.item() == 258  # 256 + 1 + 1 rounding at each step would stay at 256


def test_gradient_dtypes_follow_the_inputs():
    r, _, rows = draw(5, 4, 2, 3, torch.bfloat16)
    gates = r.gates.float().requires_grad_()
    rows.requires_grad_()
    ops.sum_rows(rows, r.order, r.position, gates).sum().backward()
    assert rows.grad.dtype == torch.bfloat16
    assert gates.grad.dtype == torch.float32
