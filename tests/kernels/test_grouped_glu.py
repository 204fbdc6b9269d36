"""The wgmma product with SwiGLU in its epilogue, against float64."""

import pytest
import torch
from calls import Kernels
from torch import Tensor
from torch.nn import functional as F
from truth import assert_close, in_every_schedule

BF16 = torch.bfloat16

# rows of each expert, padding rows after them, dim, hidden, gated
CASES = [
    ([130, 0, 70], 0, 384, 128, True),  # six steps through a ring of four; an expert without rows; two row tiles
    ([1, 63, 5], 3, 72, 136, False),  # D and F that fill no tile
    ([0, 0], 0, 64, 64, True),
    ([128], 0, 64, 64, False),  # exactly one tile
    ([0, 129], 0, 8, 8, True),
]


def made(counts: list[int], padding: int, d: int, f: int) -> dict[str, Tensor]:
    torch.manual_seed(d + f)
    m = {"rows": torch.randn(sum(counts) + padding, d).to(BF16), "gate": torch.rand(sum(counts) + padding)}
    m |= {name: (torch.randn(len(counts), f, d) * d**-0.5).to(BF16) for name in ("w_gate", "w_up")}
    m["ends"] = torch.tensor(counts).cumsum(0).int()
    return m


def by_expert(m: dict[str, Tensor], counts: list[int], gated: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """h, up and a by one product for each expert in this dtype."""
    starts = torch.tensor([0, *counts]).cumsum(0)
    runs = [m["rows"][s : s + c].to(dtype) for s, c in zip(starts, counts, strict=False)]
    h, up = (torch.cat([r @ w.to(dtype).T for r, w in zip(runs, m[n], strict=True)]) for n in ("w_gate", "w_up"))
    a = F.silu(h) * up
    if gated:
        wide = torch.promote_types(dtype, torch.float32)
        a = (a.to(wide) * m["gate"][: len(a), None].to(wide)).to(dtype)
    return {"a": a, "h": h, "up": up}


@pytest.mark.parametrize(("counts", "padding", "d", "f", "gated"), CASES)
def test_against_float64(kernels: Kernels, counts, padding, d, f, gated):
    m = made(counts, padding, d, f)
    extra = {"gate": m["gate"]} if gated else {}

    def run() -> dict[str, Tensor]:
        return kernels.grouped_glu(m["rows"], m["w_gate"], m["w_up"], m["ends"], **extra)

    out = in_every_schedule(kernels, run)
    truth, plain = by_expert(m, counts, gated, torch.float64), by_expert(m, counts, gated, BF16)
    rows = sum(counts)
    for name, value in out.items():
        assert_close(name, value[:rows], truth[name], plain[name])
        assert torch.isnan(value[rows:]).all(), "rows past the last expert are not written"


def test_without_h_and_up(kernels: Kernels):
    m = made([40, 30], 0, 64, 64)
    inputs = (m["rows"], m["w_gate"], m["w_up"], m["ends"])
    assert kernels.grouped_glu(*inputs, only_a=True)["a"].equal(kernels.grouped_glu(*inputs)["a"])


@pytest.mark.parametrize(("dtype", "d", "f"), [(0, 64, 64), (1, 60, 64), (1, 64, 12), (1, 0, 64)])
def test_what_is_not_covered_is_refused(library, dtype, d, f):
    assert library.call("grouped_glu", dtype, 4, d, f, 1, *[None] * 9) == -1
