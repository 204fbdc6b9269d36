"""The backward of the second product and of SwiGLU in one kernel, against float64."""

import pytest
import torch
from calls import Kernels
from grouped_cases import BF16, by_expert, random, routed, scaled
from torch import Tensor
from torch.nn import functional as F
from truth import assert_close, in_every_schedule

# rows of each expert, padding rows after them, dim, hidden, gated
CASES = [
    ([130, 0, 20], 0, 328, 264, True),  # six steps through a ring of four; two row tiles, two column tiles
    ([1, 63, 5], 3, 72, 136, False),  # D and F that fill no tile
    ([0, 0], 0, 64, 64, True),
    ([128], 0, 64, 256, True),  # exactly one tile
    ([0, 129], 2, 8, 8, True),
]
# tokens, choices, experts, padding rows, dim, hidden, hidden of the shared expert (0: none), gated
GATHERED = [
    (70, 2, 3, 3, 328, 72, 0, True),
    (33, 1, 2, 1, 8, 8, 0, True),
    (130, 2, 3, 0, 72, 64, 264, True),  # the shared expert's tiles: two by two
    (1, 4, 4, 0, 64, 8, 8, False),
]


def expected(dy: Tensor, w2: Tensor, counts, h: Tensor, up: Tensor, gate: Tensor | None, dtype) -> dict[str, Tensor]:
    """One product for each expert in this dtype, then autograd of plain torch."""
    da = by_expert(dy, w2.mT, counts, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    h, up = (t[: len(da)].to(dtype).requires_grad_() for t in (h, up))
    gate = None if gate is None else gate[: len(da)].to(wide).requires_grad_()
    a = scaled(F.silu(h) * up, gate, dtype)
    names, leaves = ("dh", "dup", "dgate"), (h, up, gate)
    wanted = [(n, t) for n, t in zip(names, leaves, strict=True) if t is not None]
    grads = torch.autograd.grad(a, [t for _, t in wanted], da)
    return {"a": a.detach()} | {n: g for (n, _), g in zip(wanted, grads, strict=True)}


def check(out: dict[str, Tensor], rows: int, *given) -> None:
    truth, plain = expected(*given, torch.float64), expected(*given, BF16)
    for name, value in out.items():
        assert_close(name, value[:rows], truth[name], plain[name])
        assert torch.isnan(value[rows:]).all(), "rows past the last expert are not written"


def inputs(rows: int, experts: int, d: int, f: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w2, h, up, gate."""
    return random(experts, d, f, scale=d**-0.5), random(rows, f, scale=3), random(rows, f), torch.rand(rows)


@pytest.mark.parametrize(("counts", "padding", "d", "f", "gated"), CASES)
def test_against_float64(kernels: Kernels, counts, padding, d, f, gated):
    torch.manual_seed(d + f)
    rows = sum(counts)
    w2, h, up, gate = inputs(rows + padding, len(counts), d, f)
    gate, dy, ends = gate if gated else None, random(rows + padding, d), torch.tensor(counts).cumsum(0).int()
    out = in_every_schedule(kernels, lambda: kernels.grouped_dglu(dy, w2, ends, h, up, gate=gate))
    assert ("dgate" in out) == gated
    check(out, rows, dy, w2, counts, h, up, gate)


@pytest.mark.parametrize(("tokens", "k", "experts", "padding", "d", "f", "wide", "gated"), GATHERED)
def test_gathered(kernels: Kernels, tokens, k, experts, padding, d, f, wide, gated):
    torch.manual_seed(tokens + d)
    to, dy = routed(tokens, k, experts, padding), random(tokens, d)
    w2, h, up, gate = inputs(tokens * k, experts, d, f)
    gate = gate if gated else None
    beside = inputs(tokens, 1, d, wide)[:3] if wide else None
    more = {"order": to["order"], "k": k, "gate": gate}
    if wide:
        more["shared"] = (beside[0][0], *beside[1:])
    out = in_every_schedule(kernels, lambda: kernels.grouped_dglu(dy, w2, to["ends"], h, up, **more))
    own = {name: value for name, value in out.items() if not name.startswith("shared_")}
    rows = dy[to["token"]]
    check(own, len(rows), rows, w2, to["counts"], h, up, gate)
    if wide:
        found = {name.removeprefix("shared_"): value for name, value in out.items() if name not in own}
        check(found, tokens, dy, beside[0], [tokens], *beside[1:], None)


def test_without_a(kernels: Kernels):
    w2, h, up, gate = inputs(70, 2, 64, 64)
    given = (random(70, 64), w2, torch.tensor([40, 70]).int(), h, up)
    some, whole = (kernels.grouped_dglu(*given, gate=gate, without_a=without) for without in (True, False))
    assert set(whole) - set(some) == {"a"}
    assert all(some[name].equal(whole[name]) for name in some)


def test_what_has_diverged_stays_where_it_is(kernels: Kernels):
    """NaN in a token's gradient, or in an expert's weights, beside rows and depths that fill no tile."""
    d, order, ends = 72, torch.tensor([0, 2, 1, 3]), torch.tensor([2, 4]).int()
    w2, h, up, _ = inputs(4, 2, d, 72)
    dy = random(4, d)
    broken = dy.clone()
    broken[1] = float("nan")
    dup = kernels.grouped_dglu(broken, w2, ends, h, up, order=order)["dup"]
    assert torch.isnan(dup).any(1).tolist() == [False, False, True, False]
    w2[1] = float("nan")
    dup = kernels.grouped_dglu(dy, w2, ends, h, up, order=order)["dup"]
    assert torch.isnan(dup).any(1).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("dtype", "d", "f", "k", "shared"),
    [
        *((0, 64, 64, 1, 0), (1, 60, 64, 1, 0), (1, 64, 12, 1, 0), (1, 0, 64, 1, 0), (1, 64, 0, 1, 0)),
        *((1, 64, 64, 2, 0), (1, 64, 64, 1, 8)),  # several choices, or a shared expert, without an order
    ],
)
def test_what_is_not_covered_is_refused(library, dtype, d, f, k, shared):
    assert library.call("grouped_dglu", dtype, 4, d, f, 1, k, *[None] * 11, shared, *[None] * 8) == -1
