"""modulate (LayerNorm, scale, shift) and its backward."""

import pytest
import torch
from calls import Kernels
from torch import Tensor
from torch.nn import functional as F
from truth import assert_close, in_every_schedule

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# images, tokens, dim, dtype
CASES = [
    (2, 64, 384, BF16),
    (3, 33, 256, F32),
    (1, 100, 1152, BF16),
    (4, 1, 128, F16),
    (2, 7, 72, F32),
    (2, 18, 301, BF16),  # D not a multiple of 8
    (1, 5, 30, F32),
    (1, 2, 4096, BF16),
    (2, 256, 40, F32),
    (60, 3, 64, BF16),
]


def made(b: int, t: int, d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(b + t + d)
    modulation = torch.randn(b, 6 * d).to(dtype)  # as DiT has it: parts of a wider row
    return {
        "x": (torch.randn(b, t, d) + 2 * torch.randn(b, t, 1)).to(dtype),
        "shift": modulation[:, d : 2 * d],
        "scale": modulation[:, 4 * d : 5 * d],
        "dy": torch.randn(b, t, d).to(dtype),
    }


def plain_modulate(m: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """y and all gradients by autograd of plain torch in this dtype."""
    x, shift, scale = (m[n].to(dtype).detach().requires_grad_() for n in ("x", "shift", "scale"))
    y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    grads = torch.autograd.grad(y, (x, shift, scale), m["dy"].to(dtype))
    return {"y": y.detach()} | dict(zip(("dx", "dshift", "dscale"), grads, strict=True))


@pytest.mark.parametrize(("b", "t", "d", "dtype"), CASES)
def test_forward_and_backward(kernels: Kernels, b, t, d, dtype):
    m = made(b, t, d, dtype)
    out = in_every_schedule(kernels, lambda: kernels.modulate(m["x"], m["shift"], m["scale"]))

    def backward() -> dict[str, Tensor]:
        return kernels.modulate_backward(m["dy"], m["x"], m["scale"], out["mean"], out["rstd"])

    back = in_every_schedule(kernels, backward)
    truth, plain = plain_modulate(m, torch.float64), plain_modulate(m, dtype)
    for name in plain:
        assert_close(name, (out | back)[name], truth[name], plain[name])
    x = m["x"].double()
    assert torch.allclose(out["mean"].double(), x.mean(-1), rtol=1e-5, atol=1e-6)
    assert torch.allclose(out["rstd"].double(), (x.var(-1, unbiased=False) + 1e-6).rsqrt(), rtol=1e-5)


def test_rows_far_from_zero_keep_their_variance(kernels: Kernels):
    x = 1000 + torch.randn(1, 4, 512)
    zero = torch.zeros(1, 512)
    truth = F.layer_norm(x.double(), (512,), eps=1e-6)
    assert_close("y", kernels.modulate(x, zero, zero)["y"], truth, F.layer_norm(x, (512,), eps=1e-6))


def test_equal_columns_give_the_shift(kernels: Kernels):
    shift = torch.randn(1, 64)
    out = kernels.modulate(torch.full((1, 3, 64), 5.0), shift, torch.randn(1, 64))
    assert out["y"].equal(shift.expand(1, 3, 64))


def test_no_tokens_and_no_images(kernels: Kernels):
    x, mod, stat = torch.empty(2, 0, 64), torch.randn(2, 64), torch.empty(2, 0)
    assert kernels.modulate(x, mod, mod)["y"].shape == (2, 0, 64)
    back = kernels.modulate_backward(x, x, mod, stat, stat)
    assert back["dshift"].eq(0).all()
    assert back["dscale"].eq(0).all()
    x, mod, stat = torch.empty(0, 5, 64), torch.empty(0, 64), torch.empty(0, 5)
    assert kernels.modulate_backward(x, x, mod, stat, stat)["dx"].shape == (0, 5, 64)


def test_unaligned_pointers_give_the_same(kernels: Kernels, library):
    m = made(2, 9, 64, BF16)
    moved = torch.empty(m["x"].numel() + 1, dtype=BF16)[1:].view(m["x"].shape).copy_(m["x"])
    off = Kernels(library, offset=1).modulate(moved, m["shift"], m["scale"])
    assert_close("y", off["y"], plain_modulate(m, torch.float64)["y"], plain_modulate(m, BF16)["y"])


def test_what_is_not_covered_is_refused(library):
    assert library.call("modulate", 0, 1, 1, 4104, *[None] * 3, 0, *[None] * 4) == -1, "too wide"
    assert library.call("modulate", 0, 2**20, 2**20, 64, *[None] * 3, 0, *[None] * 4) == -1, "too many rows"
