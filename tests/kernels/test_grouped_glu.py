"""The wgmma product with SwiGLU in its epilogue, against float64: rows in order, gathered, and the shared expert's."""

import pytest
import torch
from calls import Kernels
from grouped_cases import BF16, by_expert, random, routed, scaled
from torch import Tensor
from torch.nn import functional as F
from truth import assert_close, in_every_schedule

# rows of each expert, padding rows after them, dim, hidden, gated
CASES = [
    ([130, 0, 70], 0, 384, 128, True),  # six steps through a ring of four; an expert without rows; two row tiles
    ([1, 63, 5], 3, 72, 136, False),  # D and F that fill no tile
    ([0, 0], 0, 64, 64, True),
    ([128], 0, 64, 64, False),  # exactly one tile
    ([0, 129], 0, 8, 8, True),
]
# tokens, choices, experts, padding rows, dim, hidden, hidden of the shared expert (0: none), gated
GATHERED = [
    (90, 2, 3, 0, 328, 136, 0, True),  # six steps, two row tiles of one expert, two column tiles
    (70, 2, 4, 5, 72, 64, 0, False),
    (33, 1, 2, 1, 8, 8, 0, True),
    (130, 2, 3, 0, 72, 64, 136, True),  # the shared expert's tiles: two by two
    (1, 4, 4, 0, 64, 8, 8, False),
]
PARTS = ("a", "h", "up")


def made(counts: list[int], padding: int, d: int, f: int) -> dict[str, Tensor]:
    torch.manual_seed(d + f)
    rows = sum(counts) + padding
    m = {"x": random(rows, d), "gate": torch.rand(rows), "ends": torch.tensor(counts).cumsum(0).int()}
    return m | {name: random(len(counts), f, d, scale=d**-0.5) for name in ("w_gate", "w_up")}


def expected(rows: Tensor, w_gate: Tensor, w_up: Tensor, counts, gate: Tensor | None, dtype) -> dict[str, Tensor]:
    """h, up and a by one product for each expert in this dtype."""
    h, up = (by_expert(rows, w, counts, dtype) for w in (w_gate, w_up))
    return {"a": scaled(F.silu(h) * up, gate, dtype), "h": h, "up": up}


def check(out: dict[str, Tensor], rows: int, *given) -> None:
    truth, plain = expected(*given, torch.float64), expected(*given, BF16)
    for name in PARTS:
        assert_close(name, out[name][:rows], truth[name], plain[name])
        assert torch.isnan(out[name][rows:]).all(), "rows past the last expert are not written"


@pytest.mark.parametrize(("counts", "padding", "d", "f", "gated"), CASES)
def test_against_float64(kernels: Kernels, counts, padding, d, f, gated):
    m = made(counts, padding, d, f)
    gate = m["gate"] if gated else None
    weights = (m["w_gate"], m["w_up"])
    out = in_every_schedule(kernels, lambda: kernels.grouped_glu(m["x"], *weights, m["ends"], gate=gate))
    check(out, sum(counts), m["x"], *weights, counts, gate)


@pytest.mark.parametrize(("tokens", "k", "experts", "padding", "d", "f", "wide", "gated"), GATHERED)
def test_gathered(kernels: Kernels, tokens, k, experts, padding, d, f, wide, gated):
    torch.manual_seed(tokens + d)
    to, x = routed(tokens, k, experts, padding), random(tokens, d)
    weights = [random(experts, f, d, scale=d**-0.5) for _ in range(2)]
    shared = tuple(random(wide, d, scale=d**-0.5) for _ in range(2)) if wide else (None, None)
    gate = torch.rand(tokens * k) if gated else None
    more = {"order": to["order"], "k": k, "gate": gate, "shared": shared}
    out = in_every_schedule(kernels, lambda: kernels.grouped_glu(x, *weights, to["ends"], **more))
    rows = x[to["token"]]
    check(out, len(rows), rows, *weights, to["counts"], gate)
    if wide:
        beside = {name: out[f"shared_{name}"] for name in PARTS}
        check(beside, tokens, x, *(w[None] for w in shared), [tokens], None)
    else:  # the same products in the same order
        alone = kernels.grouped_glu(rows, *weights, to["ends"], gate=gate if gate is None else gate[: len(rows)])
        assert all(out[name][: len(rows)].equal(alone[name]) for name in PARTS)


def test_without_h_and_up(kernels: Kernels):
    m, to = made([40, 30], 0, 64, 64), routed(70, 1, 2)
    inputs = (m["x"], m["w_gate"], m["w_up"], to["ends"])
    more = {"order": to["order"], "shared": (m["w_gate"][0], m["w_up"][1])}
    some, whole = (kernels.grouped_glu(*inputs, only_a=only, **more) for only in (True, False))
    assert set(some) == {"a", "shared_a"}
    assert all(some[name].equal(whole[name]) for name in some)


def test_what_has_diverged_stays_where_it_is(kernels: Kernels):
    """NaN in a token, or in an expert's weights, beside rows and columns that fill no tile."""
    d, f, to = 72, 72, {"order": torch.tensor([0, 2, 1, 3]), "ends": torch.tensor([2, 4]).int(), "k": 1}
    x, weights = random(4, d), [random(2, f, d) for _ in range(2)]
    broken = x.clone()
    broken[1] = float("nan")
    a = kernels.grouped_glu(broken, *weights, to["ends"], order=to["order"])["a"]
    assert torch.isnan(a).any(1).tolist() == [False, False, True, False]
    for w in weights:
        w[1] = float("nan")
    a = kernels.grouped_glu(x, *weights, to["ends"], order=to["order"])["a"]
    assert torch.isnan(a).any(1).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("dtype", "d", "f", "k", "shared"),
    [
        *((0, 64, 64, 1, 0), (1, 60, 64, 1, 0), (1, 64, 12, 1, 0), (1, 0, 64, 1, 0), (1, 64, 0, 1, 0)),
        *((1, 64, 64, 2, 0), (1, 64, 64, 1, 8)),  # several choices, or a shared expert, without an order
    ],
)
def test_what_is_not_covered_is_refused(library, dtype, d, f, k, shared):
    assert library.call("grouped_glu", dtype, 4, d, f, 1, k, *[None] * 9, shared, *[None] * 6) == -1
