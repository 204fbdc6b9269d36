"""expert_act and its backward: SwiGLU, GELU with bias, gate, gradients."""

import pytest
import torch
from calls import Kernels
from torch import Tensor
from torch.nn import functional as F
from truth import assert_close, in_every_schedule

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# rows of each expert, padding rows after them, hidden, dtype
CASES = [
    ([40, 0, 25, 31], 0, 256, BF16),
    ([3, 70], 5, 1536, F32),
    ([0, 0, 33], 0, 72, F16),
    ([32, 32, 1, 0, 64], 7, 384, BF16),
    ([1], 0, 8, F32),
    ([17, 9], 0, 301, BF16),  # F not a multiple of 8
    ([5, 0, 12], 3, 30, F32),
    ([2, 1], 0, 8192, BF16),
    ([0, 0], 0, 64, F32),
    ([0, 0], 4, 64, F16),
    ([200, 300], 0, 40, F32),
    ([1] * 64, 0, 16, BF16),
]


def made(counts: list[int], padding: int, f: int, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(f + sum(counts))
    rows = sum(counts) + padding
    names = ("h", "up", "da")
    m = {name: (3 * torch.randn(rows, f)).to(dtype) for name in names}
    m["gate"] = torch.rand(rows)
    m["bias"] = torch.randn(len(counts), f + 24).to(dtype)[:, :f]  # as Experts.w3 has it: a part of a wider row
    m["ends"] = torch.tensor(counts).cumsum(0).int()
    m["expert"] = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return m


def plain_act(kind: str, m: dict[str, Tensor], used: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """a and all gradients by autograd of plain torch in this dtype, padding rows left out."""
    rows = len(m["expert"])
    leaves = {n: m[n].detach().to(dtype).requires_grad_() for n in ("h", "up", "bias")}
    leaves = {n: (t[:rows] if n != "bias" else t) for n, t in leaves.items()}
    wide = torch.promote_types(dtype, F32)
    gate = m["gate"][:rows].to(wide).requires_grad_()
    if kind == "swiglu":
        act = F.silu(leaves["h"]) * leaves["up"]
    else:
        act = F.gelu(leaves["h"] + leaves["bias"][m["expert"]] if "bias" in used else leaves["h"], approximate="tanh")
    a = (act.to(wide) * gate[:, None]).to(dtype) if "gate" in used else act
    inputs = {"dh": leaves["h"], "dup": leaves["up"], "dbias": leaves["bias"], "dgate": gate}
    grads = torch.autograd.grad(a, list(inputs.values()), m["da"][:rows].to(dtype), allow_unused=True)
    return {"a": a.detach()} | dict(zip(inputs, grads, strict=True))


VARIANTS = [("swiglu", ()), ("swiglu", ("gate",)), ("gelu", ()), ("gelu", ("bias",)), ("gelu", ("bias", "gate"))]


@pytest.mark.parametrize(("kind", "used"), VARIANTS)
@pytest.mark.parametrize(("counts", "padding", "f", "dtype"), CASES)
def test_forward_and_backward(kernels: Kernels, counts, padding, f, dtype, kind, used):
    if "bias" not in used:
        padding = 0  # without ends no row is padding
    m = made(counts, padding, f, dtype)
    extra = {name: m[name] for name in used} | ({"up": m["up"]} if kind == "swiglu" else {})
    if "bias" in used:
        extra["ends"] = m["ends"]
    wanted = ("a",) + (("dgate",) if "gate" in used else ())
    wanted += (("dup",) if kind == "swiglu" else ()) + (("dbias",) if "bias" in used else ())

    forward = in_every_schedule(kernels, lambda: {"a": kernels.expert_act(kind, m["h"], **extra)})
    back = in_every_schedule(kernels, lambda: kernels.expert_act_backward(kind, m["da"], m["h"], wanted, **extra))
    truth, plain = plain_act(kind, m, used, torch.float64), plain_act(kind, m, used, dtype)
    rows = sum(counts)
    for name, value in (forward | back).items():
        kept = value if name == "dbias" else value[:rows]
        assert_close(name, kept, truth[name], plain[name])
        if name != "dbias":
            assert value[rows:].eq(0).all(), f"{name} of padding rows"
    if kind == "swiglu" or rows:  # an `a` that the backward makes again is the forward's
        assert back["a"].equal(forward["a"])


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_large_numbers(kernels: Kernels, kind, dtype):
    h = torch.tensor([[-1e4, -100.0, -90.0, -20.0, 20.0, 90.0, 1e4, 0.0]]).to(dtype)
    ones = torch.ones_like(h)
    extra = {"up": ones} if kind == "swiglu" else {}
    a = kernels.expert_act(kind, h, **extra).double()
    wanted = F.silu(h.double()) if kind == "swiglu" else F.gelu(h.double(), approximate="tanh")
    assert torch.allclose(a, wanted, rtol=1e-2, atol=1e-6)
    dh = kernels.expert_act_backward(kind, ones, h, ("dup",) if kind == "swiglu" else (), **extra)["dh"].double()
    assert torch.allclose(dh, torch.tensor([[0, 0, 0, 0, 1, 1, 1, 0.5]]).double(), atol=1e-4)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_unaligned_pointers_give_the_same(kernels: Kernels, library, dtype):
    m = made([20, 13], 0, 64, dtype)
    moved = {n: torch.empty(m[n].numel() + 1, dtype=dtype)[1:].view(m[n].shape).copy_(m[n]) for n in ("h", "up", "da")}
    off = Kernels(library, offset=1)
    assert off.expert_act("swiglu", moved["h"], up=moved["up"]).equal(kernels.expert_act("swiglu", m["h"], up=m["up"]))
    both = (off, moved), (kernels, m)
    one, two = (k.expert_act_backward("swiglu", i["da"], i["h"], ("dup",), up=i["up"]) for k, i in both)
    assert all(one[name].equal(two[name]) for name in one)


def test_what_is_not_covered_is_refused(library):
    assert library.call("expert_act", 0, 2, 4, 8, 1, *[None] * 3, 0, *[None] * 4) == -1, "kind"
    assert library.call("expert_act", 9, 0, 4, 8, 1, *[None] * 3, 0, *[None] * 4) == -1, "dtype"
    assert library.call("expert_act_backward", 0, 0, 4, 8200, 1, *[None] * 4, 0, *[None] * 9) == -1, "too wide"
