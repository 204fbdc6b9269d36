"""gather_rows, sum_rows in all its forms, and their backward."""

import mmap

import pytest
import torch
from calls import Kernels
from torch import Tensor
from truth import assert_close, in_every_schedule

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# tokens, dim, choices, images, dtype
CASES = [
    (64, 384, 2, 4, BF16),
    (50, 1152, 2, 1, F32),
    (96, 256, 1, 3, F16),
    (33, 128, 4, 1, BF16),
    (40, 72, 4, 40, F32),
    (34, 301, 2, 2, BF16),  # D not a multiple of 8
    (20, 30, 1, 4, F32),
    (1, 8, 2, 1, F16),
    (3, 8192, 2, 1, BF16),  # the widest row of the backward
    (0, 64, 2, 1, BF16),
    (600, 40, 2, 8, F32),
]


def made(n: int, d: int, k: int, images: int, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(n + d)
    order = torch.randperm(n * k)
    position = torch.empty_like(order)
    position[order] = torch.arange(n * k)
    modulation = torch.randn(images, 3 * d).to(dtype)
    return {
        "x": torch.randn(n, d).to(dtype),
        "rows": torch.randn(n * k, d).to(dtype),
        "order": order,
        "position": position.view(n, k),
        "gates": torch.rand(n, k),
        "add": torch.randn(n, d).to(dtype),
        "residual": torch.randn(n, d).to(dtype),
        "ada_gate": modulation[:, d : 2 * d],  # as DiT has it: a part of a wider row
        "dout": torch.randn(n, d).to(dtype),
    }


@pytest.mark.parametrize(("n", "d", "k", "images", "dtype"), CASES)
def test_gather(kernels: Kernels, n, d, k, images, dtype):
    m = made(n, d, k, images, dtype)
    rows = in_every_schedule(kernels, lambda: {"rows": kernels.gather_rows(m["x"], m["order"], k)})["rows"]
    assert rows.equal(m["x"][m["order"] // k])


def plain_sum(m: dict[str, Tensor], images: int, dtype: torch.dtype, used: tuple[str, ...]) -> dict[str, Tensor]:
    """The definition in launchers.h, every operation in this dtype (gates in float32 at least)."""
    gates_dtype = torch.promote_types(dtype, F32)
    picked = m["rows"][m["position"]].to(dtype)
    if "gates" in used:
        picked = (picked.to(gates_dtype) * m["gates"].to(gates_dtype)[..., None]).to(dtype)
    branch = picked.sum(1)
    if "add" in used:
        branch = branch + m["add"].to(dtype)
    out = branch
    if "ada_gate" in used:
        out = out * m["ada_gate"].to(dtype).repeat_interleave(branch.shape[0] // images, 0)
    if "residual" in used:
        out = out + m["residual"].to(dtype)
    return {"out": out, "branch": branch}


@pytest.mark.parametrize("used", [(), ("gates",), ("gates", "add"), ("add", "residual", "ada_gate"), ("ada_gate",)])
@pytest.mark.parametrize(("n", "d", "k", "images", "dtype"), CASES)
def test_sum(kernels: Kernels, n, d, k, images, dtype, used):
    m = made(n, d, k, images, dtype)
    extra = {name: m[name] for name in used}
    groups = images if "ada_gate" in used else 1
    for out_dtype in {dtype, F32}:

        def run(out_dtype=out_dtype):
            return kernels.sum_rows(m["rows"], m["position"], out_dtype, groups, branch=out_dtype == dtype, **extra)

        out = in_every_schedule(kernels, run)
        truth, plain = plain_sum(m, groups, torch.float64, used), plain_sum(m, groups, out_dtype, used)
        for name, value in out.items():
            assert_close(name, value, truth[name], plain[name])


BACKWARD = [
    (("drows",), ()),
    (("drows", "dgates"), ("gates",)),
    (("drows", "dgates", "dbranch"), ("gates",)),
    (("drows", "dbranch", "dada_gate"), ("ada_gate",)),
    (("drows", "dgates", "dbranch", "dada_gate"), ("gates", "ada_gate")),
    (("dgates",), ("gates", "ada_gate")),
]


@pytest.mark.parametrize(("wanted", "used"), BACKWARD)
@pytest.mark.parametrize(("n", "d", "k", "images", "dtype"), CASES)
def test_sum_backward(kernels: Kernels, n, d, k, images, dtype, wanted, used):
    m = made(n, d, k, images, dtype)
    groups = images if "ada_gate" in used else 1
    extra = {name: m[name] for name in used}
    branch = kernels.sum_rows(m["rows"], m["position"], dtype, 1, **{n: m[n] for n in used if n == "gates"})["out"]
    for grad_dtype in {dtype, F32}:
        dout = m["dout"].to(grad_dtype)

        def run(dout=dout):
            return kernels.sum_rows_backward(dout, m["rows"], m["position"], wanted, groups, branch=branch, **extra)

        out = in_every_schedule(kernels, run)
        truth, plain = (by_definition(m, branch, dout, groups, used, t) for t in (torch.float64, dtype))
        for name in wanted:
            assert_close(name, out[name], truth[name], plain[name])


def by_definition(
    m: dict[str, Tensor], branch: Tensor, dout: Tensor, images: int, used: tuple[str, ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The gradients as launchers.h defines them, in this dtype."""
    n, k = m["position"].shape
    wide = torch.promote_types(dtype, F32)
    dbranch = dout.to(dtype)
    if "ada_gate" in used:
        dbranch = dbranch * m["ada_gate"].to(dtype).repeat_interleave(n // images, 0)
    gates = m["gates"].to(wide) if "gates" in used else torch.ones(n, k, dtype=wide)
    drows = torch.empty(m["rows"].shape, dtype=dtype)
    drows[m["position"].flatten()] = (gates[..., None] * dbranch[:, None]).flatten(0, 1).to(dtype)
    products = dbranch[:, None].to(wide) * m["rows"][m["position"]].to(wide)
    dada_gate = (dout.to(dtype) * branch.to(dtype)).view(images, -1, dout.shape[1]).sum(1)
    return {"drows": drows, "dgates": products.sum(-1), "dbranch": dbranch, "dada_gate": dada_gate}


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_unaligned_pointers_give_the_same(kernels: Kernels, library, dtype):
    m = made(37, 128, 2, 1, dtype)

    def moved(t: Tensor) -> Tensor:
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    off = Kernels(library, offset=1)
    assert off.gather_rows(moved(m["x"]), m["order"], 2).equal(kernels.gather_rows(m["x"], m["order"], 2))
    args = {"gates": m["gates"], "add": m["add"]}
    assert off.sum_rows(moved(m["rows"]), m["position"], dtype, **args)["out"].equal(
        kernels.sum_rows(m["rows"], m["position"], dtype, **args)["out"]
    )


def test_element_offsets_beyond_32_bits(kernels: Kernels):
    """Rows that start past element 2^31 of a tensor, of which only these rows have memory."""
    n, d, first = 4, 1024, 2**21 + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    far = torch.frombuffer(mmap.mmap(-1, (first + 2 * n) * d * 2, flags=flags), dtype=BF16).view(-1, d)
    far[first:] = torch.randn(2 * n, d).to(BF16)
    position = torch.arange(first, first + 2 * n).view(n, 2)
    out = kernels.sum_rows(far, position, F32)["out"]
    assert_close("out", out, far[position].double().sum(1), far[position].float().sum(1))

    gathered = torch.empty(2 * n, d, dtype=BF16)
    slots = 2 * torch.arange(first, first + 2 * n)
    assert kernels.library.call("gather_rows", 1, n, d, 2, far, slots, gathered, None) == 0
    assert gathered.equal(far[first:])

    dout = torch.randn(n, d).to(BF16)
    nothing = [None] * 4
    status = kernels.library.call(
        "sum_rows_backward", 1, 1, n, d, 2, 1, dout, None, position, None, None, None, 0, far, *nothing, None
    )
    assert status == 0
    assert far[position].equal(dout[:, None].expand(n, 2, d))


def test_what_is_not_covered_is_refused(library):
    nothing = [None] * 6
    assert library.call("gather_rows", 0, 4, 8, 3, *[None] * 4) == -1
    assert library.call("sum_rows", 1, 2, 4, 8, 2, 1, *nothing, 0, None, None, None) == -1, "out in another dtype"
    assert library.call("sum_rows", 1, 1, 4, 8, 2, 3, *nothing, 0, None, None, None) == -1, "4 tokens in 3 images"
    assert library.call("sum_rows_backward", 1, 1, 4, 8200, 2, 1, *nothing, 0, *[None] * 6) == -1, "too wide"
