"""Routing: indices and maps exact against a loop, numbers against float64, any thread order."""

import numpy as np
import pytest
import torch
from calls import Kernels
from torch import Tensor
from truth import assert_close, error, in_every_schedule, same_bits

from dsmoe.ops.reference import routing

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# tokens, dim, experts, choices, dtype, renormalize
CASES = [
    (300, 384, 8, 2, BF16, False),
    (257, 256, 8, 2, F32, True),
    (130, 1152, 16, 4, BF16, True),
    (200, 128, 4, 1, F16, True),
    (500, 64, 2, 2, F32, False),
    (64, 72, 64, 4, BF16, False),
    (193, 320, 64, 2, F32, True),
    (100, 96, 20, 4, F16, False),
    (1, 64, 4, 4, F32, True),
    (1, 8, 1, 1, F32, False),
    (70, 40, 3, 2, F32, False),
    (2049, 32, 5, 2, BF16, False),
    (150, 30, 8, 2, F32, True),  # D not a multiple of 8: single elements
    (90, 301, 16, 2, BF16, False),
    (66, 35, 40, 4, F32, True),
    (40, 3000, 16, 1, F32, False),  # weights that do not fit into shared memory
]


def inputs(n: int, d: int, e: int, dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(n * 1000 + d + e)
    x, weight = torch.randn(n, d).to(dtype), (torch.randn(e, d) * d**-0.5 * 2).to(dtype)
    return x, weight, 0.1 * torch.randn(e) if bias else None


def loop_map(scores: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """The choice and the map by a loop over tokens: NaN first, then the larger, then the lower expert."""
    n, e = scores.shape
    key = np.where(np.isnan(scores), np.inf, scores)
    indices = np.array([sorted(range(e), key=lambda i, t=t: (-key[t, i], i))[:k] for t in range(n)], np.int64)
    indices = indices.reshape(n, k)
    rows = [[] for _ in range(e)]
    for slot, expert in enumerate(indices.reshape(-1)):
        rows[expert].append(slot)
    order = np.array([slot for expert in rows for slot in expert], np.int64)
    position = np.empty(n * k, np.int64)
    position[order] = np.arange(n * k)
    counts = np.array([len(r) for r in rows], np.int64)
    ends = counts.cumsum().astype(np.int32)
    return {"indices": indices, "order": order, "position": position.reshape(n, k), "counts": counts, "ends": ends}


def assert_map_exact(out: dict[str, Tensor], k: int, bias: Tensor | None) -> None:
    scores = out["probs"] if bias is None else out["probs"] + bias
    for name, wanted in loop_map(scores.numpy(), k).items():
        assert np.array_equal(out[name].numpy(), wanted), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "d", "e", "k", "dtype", "renormalize"), CASES)
def test_forward(kernels: Kernels, n, d, e, k, dtype, renormalize, bias):
    x, weight, offset = inputs(n, d, e, dtype, bias)
    out = in_every_schedule(kernels, lambda: kernels.route(x, weight, k, renormalize, offset))
    assert_map_exact(out, k, offset)

    plain = routing.route(x, weight, k, renormalize, offset)
    probs = (x.double() @ weight.double().T).softmax(-1)
    chosen = probs.gather(1, out["indices"])
    gates = chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen
    plain_chosen = plain.probs.gather(1, out["indices"])
    plain_gates = plain_chosen / plain_chosen.sum(-1, keepdim=True) if renormalize else plain_chosen
    assert_close("probs", out["probs"], probs, plain.probs)
    assert_close("gates", out["gates"], gates, plain_gates)
    assert_close("prob_sum", out["prob_sum"], probs.sum(0), plain.probs.sum(0))
    lse = (x.double() @ weight.double().T).logsumexp(-1)
    assert_close("logsumexp", out["logsumexp"], lse, plain.logsumexp)

    # The choice is the true one but for near ties.
    scores = probs if offset is None else probs + offset.double()
    lowest_chosen = scores.gather(1, out["indices"]).min(-1).values
    assert (scores.topk(k).values.min(-1).values - lowest_chosen <= 1e-6).all()


@pytest.mark.parametrize(
    "given", [("probs",), ("gates",), ("logsumexp", "prob_sum"), ("probs", "gates", "logsumexp", "prob_sum"), ()]
)
@pytest.mark.parametrize(("n", "d", "e", "k", "dtype", "renormalize"), CASES)
def test_backward(kernels: Kernels, n, d, e, k, dtype, renormalize, given):
    x, weight, _ = inputs(n, d, e, dtype, False)
    out = kernels.route(x, weight, k, renormalize)
    shapes = {"probs": (n, e), "gates": (n, k), "logsumexp": (n,), "prob_sum": (e,)}
    grads = {name: torch.randn(shapes[name]) for name in given}
    result = in_every_schedule(kernels, lambda: {"dlogits": kernels.route_backward(out, renormalize, grads)})

    def by_autograd(dtype: torch.dtype) -> Tensor:
        logits = (x.to(dtype) @ weight.to(dtype).T).requires_grad_()
        probs = logits.softmax(-1)
        gates = probs.gather(1, out["indices"])
        gates = gates / gates.sum(-1, keepdim=True) if renormalize else gates
        values = {"probs": probs, "gates": gates, "logsumexp": logits.logsumexp(-1), "prob_sum": probs.sum(0)}
        loss = sum(((values[name] * g.to(dtype)).sum() for name, g in grads.items()), 0.0 * logits.sum())
        return torch.autograd.grad(loss, logits)[0]

    truth, plain = by_autograd(torch.float64), by_autograd(F32)
    if renormalize and k == 1 and given == ("gates",):  # the true gradient is zero
        assert result["dlogits"].abs().max() < 1e-6
        return
    assert_close("dlogits", result["dlogits"], truth, plain)


@pytest.mark.parametrize(("e", "k"), [(2, 1), (8, 2), (16, 4), (64, 4)])
def test_no_tokens(kernels: Kernels, e, k):
    out = kernels.route(torch.empty(0, 64), torch.randn(e, 64), k, False)
    assert out["counts"].eq(0).all()
    assert out["ends"].eq(0).all()
    assert out["prob_sum"].eq(0).all()
    assert kernels.route_backward(out, False, {}).shape == (0, e)


@pytest.mark.parametrize(("e", "k", "dtype"), [(2, 2, F32), (8, 2, BF16), (16, 4, F32), (64, 4, F32), (5, 1, F16)])
def test_one_expert_takes_all_and_others_stay_empty(kernels: Kernels, e, k, dtype):
    x, weight, _ = inputs(333, 64, e, dtype, False)
    bias = torch.zeros(e)
    bias[e - 1] = 10.0
    out = in_every_schedule(kernels, lambda: kernels.route(x, weight, k, False, bias))
    assert out["indices"][:, 0].eq(e - 1).all()
    assert out["counts"][e - 1] == 333
    assert_map_exact(out, k, bias)


@pytest.mark.parametrize(("e", "k"), [(2, 1), (8, 2), (16, 4), (33, 4), (64, 2)])
def test_equal_scores_go_to_the_lower_expert(kernels: Kernels, e, k):
    out = in_every_schedule(kernels, lambda: kernels.route(torch.randn(100, 32), torch.zeros(e, 32), k, False))
    assert out["indices"].equal(torch.arange(k).expand(100, k))
    assert torch.allclose(out["probs"], torch.tensor(1.0 / e))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("e", "k", "dtype"), [(2, 2, F32), (8, 2, BF16), (16, 4, F32), (64, 4, F16), (20, 2, F32)])
def test_broken_logits_keep_the_map_a_permutation(kernels: Kernels, e, k, dtype, value):
    x, weight, _ = inputs(150, 48, e, dtype, False)
    x[3, 5] = value
    x[149] = value
    weight[e - 1, 0] = value if value != value else weight[e - 1, 0]
    out = in_every_schedule(kernels, lambda: kernels.route(x, weight, k, False))
    assert_map_exact(out, k, None)
    plain = routing.route(x, weight, k, False)
    assert torch.isnan(out["probs"]).equal(torch.isnan(plain.probs))
    assert torch.isnan(out["logsumexp"]).equal(torch.isnan(plain.logsumexp))
    finite = ~torch.isnan(plain.logsumexp)
    assert torch.allclose(out["logsumexp"][finite], plain.logsumexp[finite], rtol=1e-5)
    assert sorted(out["order"].tolist()) == list(range(150 * k))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_bias_keeps_the_map_a_permutation(kernels: Kernels, value):
    x, weight, _ = inputs(100, 64, 8, F32, False)
    bias = torch.zeros(8)
    bias[3] = value
    out = kernels.route(x, weight, 2, False, bias)
    assert_map_exact(out, 2, bias)
    assert out["indices"].eq(3).any(-1).all() == (value != -float("inf"))


@pytest.mark.parametrize(("e", "dtype"), [(8, BF16), (64, F32), (16, F16)])
def test_unaligned_pointers_give_the_same(kernels: Kernels, library, e, dtype):
    x, weight, _ = inputs(140, 128, e, dtype, False)
    moved_x = torch.empty(140 * 128 + 1, dtype=dtype)[1:].view(140, 128).copy_(x)
    moved = Kernels(library, offset=1).route(moved_x, weight, 2, True)
    aligned = kernels.route(x, weight, 2, True)
    assert moved["indices"].equal(aligned["indices"])
    assert error(moved["probs"], aligned["probs"]) < 1e-6


def test_blocks_may_run_at_the_same_time(kernels: Kernels, library):
    x, weight, _ = inputs(1500, 64, 8, BF16, False)
    alone = kernels.route(x, weight, 2, False)
    library.configure(3, os_threads=3)
    together = kernels.route(x, weight, 2, False)
    assert all(same_bits(alone[name], together[name]) for name in alone)


@pytest.mark.parametrize(
    ("dtype", "n", "d", "e", "k"),
    [
        (3, 4, 8, 8, 2),
        (0, -1, 8, 8, 2),
        (0, 4, 8, 65, 2),
        (0, 4, 8, 8, 3),
        (0, 4, 8, 2, 4),
        (0, 2**30, 8, 8, 4),
        (0, 4, 8, 0, 1),
    ],
)
def test_what_is_not_covered_is_refused(library, dtype, n, d, e, k):
    assert library.call("route", dtype, n, d, e, k, 0, *[None] * 14) == -1
