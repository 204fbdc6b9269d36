"""Routing against numpy: softmax, top-k with ties, counts, order, gradients."""

import numpy as np
import pytest
import torch

from dsmoe import ops

CASES = [(1, 4, 1, 1), (5, 8, 4, 2), (64, 16, 8, 2), (33, 12, 16, 4), (7, 8, 3, 3), (0, 8, 4, 2)]  # N, D, E, k


def draw(n: int, d: int, e: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n * 100 + e)
    return torch.randn(n, d, generator=g).to(dtype), torch.randn(e, d, generator=g).to(dtype)


@pytest.mark.parametrize(("n", "d", "e", "k"), CASES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_against_numpy(n, d, e, k, renormalize):
    x, w = draw(n, d, e)
    r = ops.route(x, w, k, renormalize)
    logits = x.numpy() @ w.numpy().T
    weights = np.exp(logits)
    probs = weights / weights.sum(-1, keepdims=True)
    indices = np.argsort(-probs, axis=-1, kind="stable")[:, :k]
    gates = np.take_along_axis(probs, indices, -1)
    if renormalize:
        gates = gates / gates.sum(-1, keepdims=True)
    np.testing.assert_allclose(r.probs, probs, rtol=1e-13)
    np.testing.assert_allclose(r.gates, gates, rtol=1e-13)
    np.testing.assert_allclose(r.logsumexp, np.log(weights.sum(-1)), rtol=1e-13, atol=1e-13)
    assert np.array_equal(r.indices, indices)
    order = np.argsort(indices.ravel(), kind="stable")
    assert np.array_equal(r.order, order)
    assert np.array_equal(r.counts, np.bincount(indices.ravel(), minlength=e))
    assert np.array_equal(r.position.flatten().numpy()[order], np.arange(n * k))
    assert r.indices.dtype == r.order.dtype == r.position.dtype == r.counts.dtype == torch.int64


def test_a_bias_steers_the_choice_and_not_the_gates():
    x, w = draw(64, 16, 8)
    bias = torch.linspace(-0.3, 0.3, 8)
    r = ops.route(x, w, 2, False, bias)
    probs = np.exp(x.numpy() @ w.numpy().T)
    probs /= probs.sum(-1, keepdims=True)
    indices = np.argsort(-(probs + bias.numpy()), axis=-1, kind="stable")[:, :2]
    assert np.array_equal(r.indices, indices)
    assert not np.array_equal(indices, np.argsort(-probs, axis=-1, kind="stable")[:, :2]), "the bias changed nothing"
    np.testing.assert_allclose(r.gates, np.take_along_axis(probs, indices, -1), rtol=1e-13)
    assert np.array_equal(r.counts, np.bincount(indices.ravel(), minlength=8))


def test_many_slots_are_sorted_stably():
    x, w = draw(3000, 4, 5, torch.float32)
    r = ops.route(x, w, 2, False)
    flat = r.indices.flatten().numpy()
    assert np.array_equal(r.order, np.argsort(flat, kind="stable"))
    assert np.array_equal(r.counts, np.bincount(flat, minlength=5))


def test_ties_go_to_the_lower_expert():
    x = torch.ones(3, 2)
    equal = ops.route(x, torch.zeros(8, 2), 3, False)
    assert equal.indices.tolist() == [[0, 1, 2]] * 3
    w = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert ops.route(x, w, 3, False).indices.tolist() == [[2, 4, 1]] * 3


def test_renormalised_gates_sum_to_one_and_plain_ones_do_not():
    x, w = draw(50, 8, 8, torch.float32)
    plain, normed = ops.route(x, w, 2, False), ops.route(x, w, 2, True)
    torch.testing.assert_close(normed.gates.sum(-1), torch.ones(50))
    assert (plain.gates.sum(-1) < 0.999).any()
    assert torch.equal(plain.indices, normed.indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_routed_in_float32(dtype):
    x, w = draw(40, 16, 8, dtype)
    with ops.use("reference"):  # the compiled one leaves float16 on a CPU to the reference
        narrow, wide = ops.route(x, w, 2, False), ops.route(x.float(), w.float(), 2, False)
    assert narrow.probs.dtype == narrow.gates.dtype == narrow.logsumexp.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_no_index_leaves_the_range_when_the_network_diverged():
    x, w = draw(6, 4, 4, torch.float32)
    x[2] = float("nan")
    r = ops.route(x, w, 2, False)
    assert 0 <= int(r.indices.min()) <= int(r.indices.max()) < 4
    assert sorted(r.order.tolist()) == list(range(12))


@pytest.mark.parametrize("renormalize", [False, True])
def test_gradients(renormalize):
    x, w = (t.requires_grad_() for t in draw(5, 6, 4))
    gaps = ops.route(x, w, 4, False).gates.diff(dim=-1).abs()
    assert gaps.min() > 1e-4, "a choice could flip within the finite difference"

    def outputs(x, w):
        r = ops.route(x, w, 2, renormalize)
        return r.probs, r.gates, r.logsumexp

    # gradcheck passes over outputs that carry no gradient.
    assert all(out.requires_grad for out in outputs(x, w))
    assert torch.autograd.gradcheck(outputs, (x, w))
