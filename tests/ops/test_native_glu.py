"""The products with SwiGLU in their epilogue as torch operations, and the experts with them: against fp64."""

import pytest
import torch
from fp64_truth import assert_right, needs_kernels
from op_inputs import random, routed
from torch.nn import functional as F

from dsmoe import ops
from dsmoe.ops.native import ffn, ffn_grouped, glu

pytestmark = needs_kernels
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def closer_than_twice_plain(function, dtype, *inputs):
    """function(*inputs) -> tensors, one after the other: what was found, plain torch in this dtype, and in fp64."""
    found, plain = function(*inputs), by_loop(*inputs)
    truth = by_loop(*(t.double() if t.is_floating_point() else t for t in inputs))
    for mine, theirs, exact in zip(found, plain, truth, strict=True):
        error, allowed = ((t.double() - exact).square().mean().sqrt() for t in (mine, theirs))
        floor = torch.finfo(mine.dtype).eps / 2 * exact.square().mean().sqrt()
        assert mine.shape == exact.shape
        assert error <= 2 * torch.maximum(allowed, floor)


def by_loop(x, dy, w_gate, w_up, w2, gate, token, expert):
    """a, h, up, a, dh, dup, dgate row by row's expert, without any operation of ours."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x[token]
    h, up = ((w[expert] @ rows[:, :, None]).squeeze(-1).requires_grad_() for w in (w_gate, w_up))
    leaf = gate.to(wide).detach().requires_grad_()
    a = ((F.silu(h) * up).to(wide) * leaf[:, None]).to(x.dtype)
    da = (dy[token][:, None] @ w2[expert]).squeeze(1)
    return [t.detach() for t in (a, h, up, a)] + list(torch.autograd.grad(a, (h, up, leaf), da))


@DTYPES
@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("shape", [(60, 8, 1, 24), (70, 16, 4, 33), (40, 4, 2, 8)], ids=str)
def test_the_operations_on_a_cpu(shape, gathers, dtype):
    n, e, k, d = shape
    f, r = 2 * d, routed(n, e, k)
    x, dy = random(n, d, dtype=dtype), random(n, d, dtype=dtype, seed=1)
    weights = [random(*size, dtype=dtype, seed=i) / d**0.5 for i, size in enumerate(((e, f, d), (e, f, d), (e, d, f)))]
    gate, token = random(n * k, seed=5).sigmoid(), r.order // k

    def function(x, dy, w_gate, w_up, w2, gate, token, expert):
        order, many = (r.order, k) if gathers else (None, 1)
        left, right = (x, dy) if gathers else (x[token], dy[token])
        a, h, up = glu.grouped_glu(left, order, many, w_gate, w_up, r.ends, gate, True)
        dh, dup, again, dgate = glu.grouped_dglu(right, order, many, w2, r.ends, h, up, gate, True)
        return a, h, up, again, dh, dup, dgate

    closer_than_twice_plain(function, dtype, x, dy, *weights, gate, token, r.indices.flatten()[r.order])


@DTYPES
def test_the_shared_expert_beside(dtype):
    """It is one more expert that every token chooses, with gate 1."""
    n, d, f, wide, r = 30, 24, 16, 40, routed(30, 4, 2)
    x, routes = random(n, d, dtype=dtype), [random(*s, dtype=dtype, seed=i) for i, s in enumerate(((4, f, d),) * 2)]
    shared = [random(wide, d, dtype=dtype, seed=7), random(wide, d, dtype=dtype, seed=8)]
    found = glu.grouped_glu(x, r.order, 2, *routes, r.ends, None, True, shared=tuple(shared))
    all_tokens = torch.tensor([n], dtype=torch.int32)
    alone = glu.grouped_glu(x, None, 1, *(w[None] for w in shared), all_tokens, torch.ones(n), True)
    assert all(torch.equal(a, b) for a, b in zip(found[3:], alone, strict=True))
    dy, w2, down = random(n, d, dtype=dtype, seed=9), random(4, d, f, dtype=dtype), random(d, wide, dtype=dtype)
    beside = (down, found[4], found[5])
    back = glu.grouped_dglu(dy, r.order, 2, w2, r.ends, found[1], found[2], None, True, shared=beside)
    lone = glu.grouped_dglu(dy, None, 1, down[None], all_tokens, found[4], found[5], torch.ones(n), True)
    assert all(torch.equal(a, b) for a, b in zip(back[4:], lone[:3], strict=True))


@pytest.fixture
def glu_variant(monkeypatch):
    """moe_ffn takes the variant; a list of the passes that ran with it."""
    ran = []

    def noting(name):
        function = getattr(glu, name)
        monkeypatch.setattr(ffn_grouped, name, lambda *a: ran.append(name) or function(*a))

    noting("grouped_glu")
    noting("grouped_dglu")
    ops.prefer({"moe_ffn": "native:glu"}, "cpu")
    yield ran
    ops.prefer({}, "cpu")


@DTYPES
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (5, 8, 1, 24), (70, 16, 4, 33), (200, 4, 2, 48)], ids=str)
def test_moe_ffn(shape, shared, recompute, dtype, glu_variant):
    n, e, k, d = shape
    f, r = 2 * d, routed(n, e, k)
    inputs = {"x": random(n, d, dtype=dtype), "gates": r.gates.detach()}
    for name, size in (("w1", (e, f, d)), ("w2", (e, d, f)), ("w3", (e, f, d))):
        inputs[name] = random(*size, dtype=dtype, seed=len(inputs)) / d**0.5
    if shared:
        for name, size in (("s1", (f + 3, d)), ("s2", (d, f + 3)), ("s3", (f + 3, d))):
            inputs[name] = random(*size, dtype=dtype, seed=len(inputs)) / d**0.5

    def function(x, gates, w1, w2, w3, *matrices):
        beside = matrices or None
        return ops.moe_ffn(x, r._replace(gates=gates), (w1, w2, w3), "swiglu", shared=beside, recompute=recompute)

    assert_right(lambda **given: function(*given.values()), inputs, [random(n, d, dtype=dtype, seed=8)])
    assert glu_variant == ["grouped_glu", *(["grouped_glu"] if recompute else []), "grouped_dglu"]


def test_frozen_experts_get_no_gradient_and_change_nothing_else(glu_variant):
    r, weights = routed(50, 4, 2), [random(4, 24, 24, seed=i) for i in range(3)]
    results = []
    for frozen in (False, True):
        x = random(50, 24).requires_grad_()
        leaves = [w.clone().requires_grad_(not frozen) for w in weights]
        ops.moe_ffn(x, r, leaves, "swiglu").square().sum().backward()
        results.append(x.grad)
        assert all((w.grad is None) == frozen for w in leaves)
    assert torch.equal(*results)


def test_which_variants_there_are(glu_variant):
    r, w, w3 = routed(10, 4, 2), random(4, 8, 8), random(4, 1, 16)
    with ops.use("native"):
        by_library = ops.moe_ffn(random(10, 8), r, (w, w, w3), "gelu")
    assert torch.equal(ops.moe_ffn(random(10, 8), r, (w, w, w3), "gelu"), by_library)
    assert not glu_variant, "GELU experts know the library's products alone"
    places = (r.gates, r.indices, r.order, r.position, r.counts, r.ends)
    with pytest.raises(ValueError, match='"glu" those of swiglu'):
        torch.ops.dsmoe.moe_ffn(random(10, 8), *places, w, w, w3, *(None,) * 5, False, 1, "glu", True)
    with pytest.raises(ValueError, match='"blocks" those of swiglu on a CPU'):
        torch.ops.dsmoe.moe_ffn(random(10, 8), *places, w, w, w3, *(None,) * 5, False, 1, "blocks", True)
    with pytest.raises(ValueError, match="variant 'fast'"):
        torch.ops.dsmoe.moe_ffn(random(10, 8), *places, w, w, w, *(None,) * 5, False, 0, "fast", True)


@DTYPES
def test_opcheck(dtype):
    op, r, d, f = torch.ops.dsmoe, routed(20, 4, 2), 8, 16

    def leaf(*shape, seed=0):
        return random(*shape, dtype=dtype, seed=seed)

    x, gate, h, up = leaf(20, d), torch.rand(40), leaf(40, f), leaf(40, f, seed=1)
    stacks, beside = (leaf(4, f, d), leaf(4, f, d, seed=1)), (leaf(24, d), leaf(24, d, seed=1))
    places = (r.gates, r.indices, r.order, r.position, r.counts, r.ends)
    calls = [
        (op.grouped_glu, (x, r.order, 2, *stacks, r.ends, gate, *beside, True)),
        (op.grouped_glu, (x, r.order, 2, *stacks, r.ends, None, None, None, False)),
        (op.grouped_dglu, (x, r.order, 2, leaf(4, d, f), r.ends, h, up, gate, None, None, None, True)),
        (op.grouped_dglu, (x, r.order, 2, leaf(4, d, f), r.ends, h, up, None, leaf(d, 24), leaf(20, 24),
                           leaf(20, 24, seed=1), False)),
        (op.moe_ffn, (leaf(20, d).requires_grad_(), *places, *stacks[:1], leaf(4, d, f).requires_grad_(), stacks[1],
                      leaf(24, d).requires_grad_(), leaf(d, 24), leaf(24, d), leaf(20, d),
                      leaf(5, d).requires_grad_(), True, 0, ffn.GLU, True)),
    ]  # fmt: skip
    for packet, arguments in calls:
        torch.library.opcheck(packet.default, arguments)
    with pytest.raises(RuntimeError, match="dsmoe::grouped_glu has no gradient"):
        op.grouped_glu(x.requires_grad_(), *calls[0][1][1:])[0].sum().backward()
