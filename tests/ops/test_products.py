"""Products on processors with and without bf16 instructions, against float64."""

import pytest
import torch

from dsmoe.ops import products


@pytest.fixture(params=[True, False], ids=["fast bf16", "through float32"])
def processor(request, monkeypatch):
    monkeypatch.setattr(products, "_fast_bfloat16", lambda: request.param)


def _made(dtype, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _holds(out, truth, plain):
    ours, theirs = (float((t.double() - truth).norm()) for t in (out, plain))
    assert ours <= 2 * theirs + 1e-30, (ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_products(processor, dtype, rows):
    left, right, start = _made(dtype, rows, 96), _made(dtype, 40, 96).mT, _made(dtype, 40)
    out = torch.full((rows, 40), torch.nan, dtype=dtype)
    products.mm(left, right, out)
    _holds(out, left.double() @ right.double(), left @ right)
    products.addmm(start, left, right, out)
    _holds(out, start.double() + left.double() @ right.double(), torch.addmm(start, left, right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_added_to_what_is_there(processor, dtype):
    left, right, out = _made(dtype, 12, 96), _made(dtype, 96, 40), _made(dtype, 12, 40)
    truth, plain = out.double() + left.double() @ right.double(), torch.addmm(out, left, right)
    products.addmm(out, left, right, out)
    _holds(out, truth, plain)


def test_a_processor_without_bf16_multiplies_in_float32(monkeypatch):
    seen = []
    product = torch.mm

    def recorded(left, right, **how):
        seen.append(left.dtype)
        return product(left, right, **how)

    monkeypatch.setattr(torch, "mm", recorded)
    for fast, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(products, "_fast_bfloat16", lambda fast=fast: fast)
        products.mm(_made(torch.bfloat16, 4, 8), _made(torch.bfloat16, 8, 4), torch.empty(4, 4, dtype=torch.bfloat16))
        assert seen.pop() == dtype
