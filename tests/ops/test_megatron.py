"""Megatron-core's permutation through our signatures: the same rows, sums within rounding, the same gradients.

Skipped where megatron-core is not installed (`pip install --no-deps megatron-core`; extra `megatron`); that its own
functions agree with ours is tests/moe/test_megatron.py.
"""

import builtins

import pytest
import torch

from dsmoe import ops
from dsmoe.base.errors import ConfigError
from dsmoe.base.presets import ModelSpec
from dsmoe.moe import MoE
from dsmoe.ops import megatron
from dsmoe.ops.reference import rows as reference

pytest.importorskip(
    "megatron.core.transformer.moe.moe_utils", reason="megatron-core is not installed (extra `megatron`)"
)

SHAPES = [(1, 4, 1), (37, 8, 2), (64, 8, 4), (6, 64, 2), (0, 4, 2)]  # tokens, experts, k
DTYPES = [torch.float32, torch.bfloat16]
BOTH = {"gather_rows": "megatron", "sum_rows": "megatron"}


@pytest.fixture(autouse=True)
def default_order_afterwards():
    yield
    ops.prefer({}, "cpu")


def draw(tokens, experts, k, dtype):
    """Tokens, their routing, rows, and upstream gradients of rows and of sums."""
    generator = torch.Generator().manual_seed(tokens + experts)
    x, weight, rows, drows, dsum = (
        torch.randn(n, 12, generator=generator) for n in (tokens, experts, tokens * k, tokens * k, tokens)
    )
    return x.to(dtype), ops.route(x, weight, k, False), rows.to(dtype), drows.to(dtype), dsum


def outcome(function, upstream, *inputs, dtype=None):
    """Output and gradients of the inputs; dtype: of everything, for the truth."""
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out = function(*inputs)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(t.grad for t in inputs)]


def assert_right(implementation, reference, upstream, *inputs):
    """Right is an error against fp64 of at most 2x the reference's in the same dtype; exact where that is exact."""
    truth = outcome(reference, upstream, *inputs, dtype=torch.float64)
    results = [outcome(function, upstream, *inputs) for function in (implementation, reference)]
    for found, plain, exact in zip(*results, truth, strict=True):
        assert (found.dtype, found.shape) == (plain.dtype, plain.shape)
        errors = [(t.double() - exact).square().sum().sqrt().item() for t in (found, plain)]
        assert errors[0] <= 2 * errors[1], errors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_ours_and_their_gradient_is_added_in_float32(shape, dtype):
    x, r, _, drows, _ = draw(*shape, dtype)
    assert torch.equal(megatron.gather_rows(x, r.order, r.position), ops.gather_rows(x, r.order, r.position))
    assert_right(
        lambda x: megatron.gather_rows(x, r.order, r.position),
        lambda x: reference.gather_rows(x, r.order, r.position),
        drows,
        x,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_and_their_gradients(shape, dtype):
    _, r, rows, _, dsum = draw(*shape, dtype)
    theirs = megatron.sum_rows(rows, r.order, r.position, r.gates)
    assert theirs.dtype == torch.float32
    for gates in ((), (r.gates,)):
        assert_right(
            lambda rows, *gates: megatron.sum_rows(rows, r.order, r.position, *gates),
            lambda rows, *gates: reference.sum_rows(rows, r.order, r.position, *gates),
            dsum,
            rows,
            *gates,
        )


def test_any_permutation_of_rows_is_gathered():
    """Rows that came from other ranks are put by expert and back with one choice a row, in any order."""
    x = torch.arange(40.0).view(20, 2)
    for seed in range(5):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(megatron.gather_rows(x, order, order.argsort()[:, None]), x[order])


def test_a_layer_with_the_preference_runs_it_and_gives_the_same(monkeypatch):
    torch.manual_seed(0)
    moe, x = MoE(ModelSpec(depth=1, dim=16, heads=1, num_experts=4, shared_ratio=1.0)), torch.randn(3, 5, 16)
    in_pieces = {"moe_ffn": "reference"}  # the native one has its own inside
    ops.prefer(dict.fromkeys(BOTH, "reference") | in_pieces, "cpu")
    plain = moe(x)[0]
    calls = []
    for name in BOTH:
        theirs = getattr(megatron.load(), {"gather_rows": "permute", "sum_rows": "unpermute"}[name])
        monkeypatch.setattr(
            megatron.load(), theirs.__name__, lambda *a, f=theirs, **k: calls.append(f.__name__) or f(*a, **k)
        )
    ops.prefer(BOTH | in_pieces, "cpu")
    assert {name: chosen for name, chosen, _ in ops.implementations("cpu") if name in BOTH} == BOTH
    # Two choices a token: a sum of two terms is the same in either order.
    assert torch.equal(moe(x)[0], plain)
    assert calls == ["permute", "unpermute"]
    moe.to("meta")(x.to("meta"))  # not served there: the default order


def test_a_package_that_does_not_import_is_one_line(monkeypatch):
    def refuse(name, *arguments):
        if name.startswith("megatron"):
            raise RuntimeError("half\na package")
        return real(name, *arguments)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    megatron.load.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"megatron-core does not import \(RuntimeError: half a package\)"):
            ops.check_preferences(BOTH, "cpu")
    finally:
        megatron.load.cache_clear()
