"""SwiGLU experts by the CPU's own kernels (variant "blocks" of moe_ffn): against fp64, to the bit, at their limits."""

import pytest
import torch
from fp64_truth import assert_right, needs_kernels
from op_inputs import random, routed

from dsmoe import ops
from dsmoe.ops import native

pytestmark = needs_kernels
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def blocks():
    ops.prefer({"moe_ffn": "native:blocks"}, "cpu")
    yield
    ops.prefer({}, "cpu")


def layer(n, e, k, d, f, shared=0, dtype=torch.float32):
    """Inputs of `run` by name, and the routing."""
    r = routed(n, e, k)
    inputs = {"x": random(n, d, dtype=dtype), "gates": r.gates.detach()}
    sizes = {"w1": (e, f, d), "w2": (e, d, f), "w3": (e, f, d)}
    if shared:
        sizes |= {"s1": (shared, d), "s2": (d, shared), "s3": (shared, d)}
    inputs |= {
        name: random(*size, dtype=dtype, seed=i) / size[-1] ** 0.5 for i, (name, size) in enumerate(sizes.items())
    }
    return inputs, r


def run(r, recompute=False, **inputs):
    x, gates, w1, w2, w3, *shared = inputs.values()
    return ops.moe_ffn(x, r._replace(gates=gates), (w1, w2, w3), "swiglu", shared=shared or None, recompute=recompute)


def gradients(r, inputs, recompute=False, frozen=()):
    """Output and gradients by name."""
    leaves = {name: t.clone().requires_grad_(name not in frozen) for name, t in inputs.items()}
    y = run(r, recompute, **leaves)
    y.backward(random(*y.shape, dtype=y.dtype, seed=9))
    return {"y": y.detach()} | {name: t.grad for name, t in leaves.items()}


@DTYPES
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("experts", [4, 8, 16, 64])
@pytest.mark.parametrize("n", [0, 40, 200], ids=lambda n: f"{n} tokens")
def test_against_fp64(n, experts, k, dtype):
    """Blocks that are full, ragged, of one row, and experts without any."""
    inputs, r = layer(n, experts, k, 40, 56, shared=24, dtype=dtype)
    assert_right(lambda **given: run(r, **given), inputs, [random(n, 40, dtype=dtype, seed=9)])


@DTYPES
@pytest.mark.parametrize(
    ("n", "d", "f"),
    [(1500, 24, 40), (40, 520, 36), (40, 24, 4100), (300, 300, 600), (50, 7, 9), (30, 1, 1), (100, 17, 25)],
    ids=["many rows", "wide", "deep", "large", "odd", "one", "one above a panel"],
)
def test_against_fp64_at_shapes_that_are_cut_to_pieces(n, d, f, dtype):
    inputs, r = layer(n, 2, 2, d, f, shared=f // 2, dtype=dtype)
    assert_right(lambda **given: run(r, **given), inputs, [random(n, d, dtype=dtype, seed=9)])


@DTYPES
def test_bits_depend_on_neither_threads_nor_what_was_kept(dtype):
    inputs, r = layer(700, 4, 2, 72, 200, shared=100, dtype=dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for count, recompute in ((1, False), (2, False), (5, True), (2, True)):
            torch.set_num_threads(count)
            found.append(gradients(r, inputs, recompute))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


@DTYPES
def test_a_token_gets_the_same_bits_in_any_company(dtype):
    """Of its block, its group of blocks and the order of tokens, none shows in a token's own results."""
    inputs, r = layer(300, 4, 2, 24, 48, dtype=dtype)
    alone = torch.tensor([7, 100, 299])
    some = ops.route(random(300, 16, seed=1)[alone], random(4, 16, seed=2), 2, False)
    assert torch.equal(some.indices, r.indices[alone])
    few = inputs | {"x": inputs["x"][alone], "gates": r.gates[alone]}
    assert torch.equal(run(some, **few), run(r, **inputs)[alone])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_diverged_token_stays_alone(value, recompute):
    """Lanes beyond a block's rows hold zeros, which an infinite weight would turn to NaN: they must not leave it."""
    inputs, r = layer(90, 4, 2, 24, 40)
    inputs["x"][5, 3] = value
    found = gradients(r, inputs, recompute)
    others = torch.arange(90) != 5
    assert not found["y"][5].isfinite().all()
    for name in ("y", "x", "gates"):
        assert found[name][others].isfinite().all(), name
    hit = torch.zeros(4, dtype=torch.bool)
    hit[r.indices[5]] = True
    for name in ("w1", "w2", "w3"):
        assert found[name][~hit].isfinite().all(), name
        assert not found[name][hit].flatten(1).isfinite().all(1).any(), "the divergence must stay visible"


def test_an_infinite_weight_reaches_its_own_expert_alone():
    inputs, r = layer(90, 4, 2, 24, 40)
    inputs["w2"][1, 3, 7] = float("inf")
    found, clean = gradients(r, inputs), (r.indices != 1).all(1)
    assert clean.any()
    assert found["y"][clean].isfinite().all()
    assert found["x"][clean].isfinite().all()
    assert all(found[name][[0, 2, 3]].isfinite().all() for name in ("w1", "w2", "w3"))


def test_frozen_experts_get_no_gradient_and_change_nothing_else():
    inputs, r = layer(50, 4, 2, 24, 40, shared=16)
    frozen = [name for name in inputs if name[0] in "ws"]
    every, some = gradients(r, inputs), gradients(r, inputs, frozen=frozen)
    assert all(some[name] is None for name in frozen)
    assert all(torch.equal(every[name], some[name]) for name in ("y", "x", "gates"))


def test_strided_inputs():
    inputs, r = layer(60, 4, 2, 24, 40, shared=16)
    wide = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in inputs.items()}
    assert not wide["w1"].is_contiguous()
    assert torch.equal(run(r, **wide), run(r, **inputs))


@DTYPES
def test_opcheck_of_the_pieces(dtype):
    inputs, r = layer(20, 4, 2, 8, 16, dtype=dtype)
    x, gates, *weights = inputs.values()
    op, one = torch.ops.dsmoe, [w[:1] for w in weights]
    for placed, stacks, keep in (
        ((r.order, 2, gates, r.counts), weights, True),
        ((r.order, 2, None, r.counts), weights, False),
        ((None, 1, None, torch.tensor([20])), one, True),
    ):
        torch.library.opcheck(op.glu_experts.default, (x, *placed, *stacks, keep))
        _, *kept = op.glu_experts(x, *placed, *stacks, keep)
        kept = kept if keep else (None, None)
        torch.library.opcheck(op.glu_experts_backward.default, (x, x, *placed, *stacks, *kept, keep))
    with pytest.raises(RuntimeError, match="dsmoe::glu_experts has no gradient"):
        op.glu_experts(x.clone().requires_grad_(), r.order, 2, gates, r.counts, *weights, True)[0].sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": torch.tensor([20, 20, 0, 1])}, "counts must sum to the rows"),
        ({"counts": torch.tensor([60, -20, 0, 0])}, "counts must not be negative"),
        ({"order": torch.arange(39)}, "order must have N \\* k elements"),
        ({"order": torch.full((40,), 40)}, "order must be of 0 to R - 1"),
        ({"gates": torch.ones(20, 2, dtype=torch.float64)}, "gates must be float32"),
        ({"w2": torch.ones(4, 16, 8)}, r"w2 must be \[E, D, F\]"),
        ({"w3": torch.ones(4, 16, 8, dtype=torch.bfloat16)}, "one dtype"),
        ({"x": torch.ones(20, 8, dtype=torch.float64)}, "float32 or bfloat16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(change, message):
    inputs, r = layer(20, 4, 2, 8, 16)
    x, gates, w1, w2, w3 = inputs.values()
    given = {"x": x, "order": r.order, "k": 2, "gates": gates, "counts": r.counts, "w1": w1, "w2": w2, "w3": w3}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dsmoe.glu_experts(**(given | change), keep=True)


def test_a_backward_that_does_not_fit_is_refused():
    inputs, r = layer(20, 4, 2, 8, 16)
    x, gates, *weights = inputs.values()
    run_backward, placed = torch.ops.dsmoe.glu_experts_backward, (r.order, 2, gates, r.counts, *weights)
    h = torch.ones(40, 16)
    for dy, kept, message in (
        (x[:19], (h, h), "dy must be as x"),
        (x, (h, None), "both h and up or neither"),
        (x, (h, h[:39]), "as glu_experts kept them"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run_backward(dy, x, *placed, *kept, True)


@pytest.mark.parametrize(
    ("isa", "machine", "dim", "kind", "expected"),
    [
        ("base", "x86_64", 128, "swiglu", "blocks"),
        ("base", "x86_64", 129, "swiglu", "library"),
        ("base", "x86_64", 64, "gelu", "library"),
        ("base", "aarch64", 64, "swiglu", "library"),
        ("avx512", "x86_64", 64, "swiglu", "library"),
    ],
)
def test_the_default_is_what_was_measured_faster(isa, machine, dim, kind, expected, monkeypatch):
    ran = []
    monkeypatch.setattr(native.ffn, "call", lambda *given: ran.append(given[-1]))
    monkeypatch.setattr(native, "_BLOCKS_UP_TO", native._blocks_up_to(isa, machine))
    stacks = [random(2, 8, dim), random(2, dim, 8), random(2, 8, dim) if kind == "swiglu" else random(2, 1, 8 + dim)]
    native.moe_ffn(random(4, dim), routed(4, 2, 1), stacks, kind)
    native.moe_ffn(random(4, dim), routed(4, 2, 1), stacks, kind, variant="glu")
    assert ran == [expected, "glu" if kind == "swiglu" else "library"]
