"""Every op in each implementation, forward and backward, against fp64; corner cases; determinism.

The truth tests run on a GPU too, where there is one (tests/ops/test_gpu.py holds what only a GPU can show).
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fp64_truth import BOTH, assert_right, needs_kernels, outcome
from op_inputs import random, routed

from dsmoe import ops
from dsmoe.ops import native
from dsmoe.ops.native import ffn_by_expert, ffn_grouped
from dsmoe.ops.native.ffn_parts import End, Kept, Places, Weights

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# tokens, experts, choices, dim: nothing, one, fewer than a vector, ragged dims, several units, many; and long sums.
SHAPES = [
    (0, 4, 2, 8), (1, 2, 1, 5), (7, 4, 4, 24), (65, 8, 2, 33), (130, 16, 1, 64), (300, 64, 4, 40), (2500, 8, 2, 16),
    (60, 8, 2, 4100),
]  # fmt: skip


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Tensors made without a device lie there."""
    with nullcontext() if request.param == "cpu" else torch.device(request.param):
        yield request.param


def preferred(name, device):
    """For every op that has it; a reference inside an op stays."""
    if name == "native" and device not in native.DEVICES:
        pytest.skip(f"compiled operations: {ops.kernels()}")
    ops.prefer({op: name for op, _, names in ops.implementations(device) if name in names}, device)
    yield name
    ops.prefer({}, device)


@pytest.fixture(params=BOTH)
def implementation(request, device):
    yield from preferred(request.param, device)


@pytest.fixture(params=BOTH[1:])
def compiled(request, device):
    """The reference is the yardstick itself, and is held against numpy in the files beside this one."""
    yield from preferred(request.param, device)


# ---- route


@DTYPES
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_route(shape, renormalize, dtype, compiled):
    n, e, k, d = shape
    inputs = {"x": random(n, d, dtype=dtype), "weight": random(e, d, dtype=dtype, seed=1) / d**0.5}
    chosen = ops.route(**inputs, k=k, renormalize=renormalize)
    check_map(chosen, e)

    def function(x, weight):
        r = ops.route(x, weight, k, renormalize)
        # The same experts in every precision: choices are compared by check_map and by the reference's below.
        gates = r.probs.gather(1, chosen.indices)
        return r.probs, gates if not renormalize else gates / gates.sum(-1, keepdim=True), r.logsumexp, r.prob_sum

    assert_right(function, inputs, [random(n, e), random(n, k), random(n), random(e)])
    with ops.use("reference"):
        plain = ops.route(**inputs, k=k, renormalize=renormalize)
    gap = chosen.probs.double().sort(-1, descending=True).values.diff(dim=-1).abs()
    clear = gap[:, :k].amin(-1) > 1e-6 if e > 1 and n else torch.ones(n, dtype=torch.bool)
    assert torch.equal(chosen.indices[clear], plain.indices[clear])
    assert clear.float().mean() > 0.9 or n == 0


def check_map(r, experts):
    """Counts, order, position and ends against numpy, from the choices alone."""
    r = r._replace(**{name: t.cpu() for name, t in r._asdict().items()})
    flat = r.indices.flatten().numpy()
    order = np.argsort(flat, kind="stable")
    assert np.array_equal(r.order, order)
    assert np.array_equal(r.position.flatten().numpy()[order], np.arange(flat.size))
    assert np.array_equal(r.counts, np.bincount(flat, minlength=experts))
    assert np.array_equal(r.ends, np.cumsum(r.counts.numpy()))
    assert r.ends.dtype == torch.int32


@DTYPES
@pytest.mark.parametrize("renormalize", [False, True])
def test_gradients_of_the_gates_themselves(renormalize, dtype, compiled):
    """Through the op's own gates, where all precisions choose alike."""
    inputs = {"x": random(40, 24, dtype=dtype), "weight": random(6, 24, dtype=dtype, seed=1)}
    wide = ops.route(*(t.double() for t in inputs.values()), 2, renormalize)
    assert torch.equal(ops.route(**inputs, k=2, renormalize=renormalize).indices, wide.indices)
    assert_right(lambda x, weight: ops.route(x, weight, 2, renormalize).gates, inputs, [random(40, 2)])


def test_ties_and_biases_choose_as_the_reference(implementation):
    x, weight = random(70, 8), random(16, 8, seed=1)
    weight[5:9] = weight[2]
    bias = random(16, seed=3) / 4
    for given in (None, bias, torch.zeros(16)):
        found = ops.route(x, weight, 4, True, given)
        # Computed probabilities decide: equal columns are equal numbers in every implementation.
        scores = found.probs if given is None else found.probs + given
        assert np.array_equal(found.indices.cpu(), np.argsort(-scores.cpu().numpy(), axis=-1, kind="stable")[:, :4])
        torch.testing.assert_close(found.gates.sum(-1), torch.ones(70))
    assert torch.equal(found.probs[:, 5:9], found.probs[:, 2:3].expand(-1, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_diverged_network_keeps_indices_in_range(value, implementation):
    x, weight = random(80, 8), random(4, 8, seed=1)
    x[3], x[70, 2] = value, value
    r = ops.route(x, weight, 2, False)
    check_map(r, 4)
    assert 0 <= int(r.indices.min()) <= int(r.indices.max()) < 4
    assert (r.indices[:, 0] != r.indices[:, 1]).all()
    assert not r.probs[3].isfinite().any(), "the divergence must stay visible"
    others = torch.ones(80, dtype=torch.bool)
    others[[3, 70]] = False
    assert r.probs[others].isfinite().all()


# ---- rows


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_there_and_back(shape, dtype, compiled):
    n, e, k, d = shape
    r = routed(n, e, k)
    x = random(n, d, dtype=dtype)
    assert torch.equal(ops.gather_rows(x, r.order, r.position), x[r.order // k])
    assert_right(lambda x: ops.gather_rows(x, r.order, r.position), {"x": x}, [random(n * k, d, dtype=dtype)])
    rows, images = random(n * k, d, dtype=dtype), 5 if n % 5 == 0 and n else 1
    inputs = {"rows": rows, "gates": r.gates.detach()}
    for extra in ((), ("add",), ("add", "residual", "ada_gate"), ("residual", "ada_gate")):
        more = {name: random(images if name == "ada_gate" else n, d, dtype=dtype, seed=len(name)) for name in extra}
        for narrow in (False, True):
            for gated in (inputs, {"rows": rows}):
                assert_right(
                    lambda rows, narrow=narrow, **kw: ops.sum_rows(rows, r.order, r.position, narrow=narrow, **kw),
                    gated | more,
                    [random(n, d)],
                )


# ---- activation


@DTYPES
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["swiglu", "gelu", "gelu with bias"])
@pytest.mark.parametrize(
    ("counts", "hidden"), [([0, 0], 8), ([3, 0, 70, 1], 5), ([0, 129], 48), ([1] * 8, 33), ([40, 20], 4100)], ids=str
)
def test_expert_act(kind, gated, counts, hidden, dtype, compiled):
    rows = sum(counts)
    inputs = {"h": 3 * random(rows, hidden, dtype=dtype)}
    if kind == "swiglu":
        inputs["up"] = random(rows, hidden, dtype=dtype, seed=1)
    if kind == "gelu with bias":
        inputs["bias"] = random(len(counts), hidden, dtype=dtype, seed=2)
    if gated:
        inputs["gate"] = random(rows, seed=3).sigmoid()
    counts = torch.tensor(counts)
    assert_right(
        lambda **given: ops.expert_act(kind=kind.split()[0], counts=counts, **given),
        inputs,
        [random(rows, hidden, dtype=dtype, seed=4)],
    )


def test_activations_at_the_ends_of_the_range(implementation):
    h = torch.tensor([[-1e4, -120.0, -88.0, -30.0, 0.0, 30.0, 88.5, 1e4, float("nan"), float("inf")]])
    for kind, up in (("swiglu", torch.ones_like(h)), ("gelu", None)):
        found = ops.expert_act(h, kind, up)
        with ops.use("reference"):
            expected = ops.expert_act(h.double(), kind, up if up is None else up.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-10, equal_nan=True)


# ---- modulation


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(0, 3, 8), (2, 0, 8), (1, 1, 5), (3, 70, 33), (2, 256, 64), (5, 129, 384), (2, 9, 4090)],
    ids=str,
)
def test_modulate(shape, dtype, compiled):
    b, t, d = shape
    inputs = {"x": 4 * random(b, t, d, dtype=dtype) + 2}
    inputs |= {name: random(b, d, dtype=dtype, seed=i) for i, name in enumerate(("shift", "scale"))}
    assert_right(ops.modulate, inputs, [random(b, t, d, dtype=dtype, seed=9)])


# ---- the whole block


@DTYPES
@pytest.mark.parametrize("end", [(), ("shared",), ("ada_gate",), ("shared", "residual", "ada_gate")], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("kind", "products"), [("swiglu", "library"), ("swiglu", "blocks"), ("gelu", "library")])
# The second has experts without rows, and enough gates for an RMS of their gradients' errors that is not chance.
@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (40, 48, 1, 24), (70, 16, 4, 33), (200, 4, 2, 48)], ids=str)
def test_moe_ffn(shape, kind, products, recompute, end, dtype, compiled, device):
    if device == "cpu":
        ops.prefer({"moe_ffn": f"native:{products}"}, device)
    elif products == "blocks":
        pytest.skip("kernels of the CPU")
    n, e, k, d = shape
    f, r = 2 * d, routed(n, e, k)
    inputs = {"x": random(n, d, dtype=dtype), "gates": r.gates.detach()}
    third = (e, f, d) if kind == "swiglu" else (e, 1, f + d)
    for name, size in (("w1", (e, f, d)), ("w2", (e, d, f)), ("w3", third)):
        inputs[name] = random(*size, dtype=dtype, seed=len(inputs)) / d**0.5
    sizes = {"residual": (n, d), "ada_gate": (min(n, 5), d)}
    inputs |= {name: random(*sizes[name], dtype=dtype, seed=i) for i, name in enumerate(end, start=20) if name in sizes}
    if "shared" in end:
        sizes = {"s1": (f + 3, d), "s2": (d, f + 3), "s3": (f + 3, d)}
        inputs |= {name: random(*sizes[name], dtype=dtype, seed=i) / d**0.5 for i, name in enumerate(sizes, start=30)}

    def function(x, gates, w1, w2, w3, s1=None, s2=None, s3=None, **given):
        shared = None if s1 is None else (s1, s2, s3)
        to = r._replace(gates=gates)
        return ops.moe_ffn(x, to, (w1, w2, w3), kind, shared=shared, **given, recompute=recompute)

    assert_right(function, inputs, [random(n, d, dtype=dtype, seed=8)])


@needs_kernels
@pytest.mark.parametrize(("kind", "variant"), [("swiglu", "library"), ("swiglu", "glu"), ("gelu", "library")])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("rest", [False, True])
def test_the_gpu_compositions_of_the_block_give_the_same(kind, variant, weights, keep, rest):
    """All experts by grouped products, as on a GPU; here from the CPU's pieces."""
    r, code, x = routed(90, 4, 2), {"swiglu": 0, "gelu": 1}[kind], random(90, 24)
    to = Places(r.gates, r.indices, r.order, r.position, r.counts, r.ends)
    third = (4, 32, 24) if kind == "swiglu" else (4, 1, 56)
    sizes = ((4, 32, 24), (4, 24, 32), third, *(((20, 24), (24, 20), (20, 24)) if rest else ()))
    given = [random(*size, seed=i) for i, size in enumerate(sizes)]
    residual, ada_gate = (random(90, 24, seed=7), random(3, 24, seed=8)) if rest else (None, None)
    before, glu = (x, to, Weights(*given), End(residual, ada_gate, rest)), variant == "glu"
    one = ffn_by_expert.forward(*before, code, keep)
    all_ = ffn_grouped.forward_glu(*before, keep) if glu else ffn_grouped.forward(*before, code, keep)
    torch.testing.assert_close(all_[0], one[0])
    torch.testing.assert_close(all_[5], one[5])

    def kept(h, up, shared_h, shared_up, branch):
        shared = (shared_h, shared_up) if keep and rest else (None, None)
        return Kept(*((h, up if code == 0 else None) if keep else (None, None)), *shared, branch if rest else None)

    dy = random(90, 24, seed=5)
    one = ffn_by_expert.backward(dy, x, to, Weights(*given), kept(*one[1:]), ada_gate, code, weights)
    given = (dy, x, to, Weights(*given), kept(*all_[1:]), ada_gate)
    all_ = ffn_grouped.backward_glu(*given, weights) if glu else ffn_grouped.backward(*given, code, weights)
    for a, b in zip(one, all_, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- what the kernels do not cover, and strides


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_the_reference_with_the_same_result(dtype, implementation, device):
    if dtype == torch.float16 and device != "cpu":
        pytest.skip("the GPU's kernels take float16")
    x, weight, h = random(20, 12).to(dtype), random(4, 12, seed=1).to(dtype), random(40, 12, seed=2).to(dtype)
    shift = random(2, 12, seed=3).to(dtype)
    r = ops.route(x, weight, 2, False)

    def everything():
        routing = ops.route(x, weight, 2, False)
        stacks = [random(4, 12, 12, seed=i).to(dtype) for i in range(3)]
        return (
            *routing, ops.gather_rows(x, r.order, r.position), ops.sum_rows(h, r.order, r.position, r.gates),
            ops.expert_act(h, "swiglu", h), ops.modulate(x.view(2, 10, 12), shift, shift),
            ops.moe_ffn(x, r, stacks, "swiglu"),
        )  # fmt: skip

    found = everything()
    with ops.use("reference"):
        assert all(torch.equal(a, b) for a, b in zip(found, everything(), strict=True))


@DTYPES
def test_strided_inputs(dtype, implementation):
    def wide(t):
        """The same numbers, every second column of a wider tensor."""
        return torch.stack([t, t], dim=-1)[..., 0]

    x, weight, r = random(60, 12, dtype=dtype), random(4, 12, dtype=dtype, seed=1), routed(60, 4, 2)
    h, shift = random(120, 12, dtype=dtype, seed=2), random(3, 24, dtype=dtype, seed=3)
    first, second = shift.chunk(2, dim=1)  # rows in order, not contiguous: how a block's modulation comes
    pairs = [
        (lambda f: ops.route(f(x), f(weight), 2, True).gates),
        (lambda f: ops.gather_rows(f(x), r.order, r.position)),
        (lambda f: ops.sum_rows(f(h), r.order, r.position, f(r.gates), add=f(x), residual=f(x), ada_gate=f(first))),
        (lambda f: ops.expert_act(f(h), "swiglu", f(h), gate=f(h[:, 0].float()))),
        (
            lambda f: ops.modulate(
                f(x).view(3, 20, 12) if f(x).is_contiguous() else f(x.view(3, 20, 12)), f(first), second
            )
        ),
    ]
    for function in pairs:  # the library's products may round strided operands in another order
        torch.testing.assert_close(function(wide), function(lambda t: t.contiguous()), rtol=1e-6, atol=1e-6)


# ---- determinism


@needs_kernels
@DTYPES
def test_every_bit_is_the_same_on_every_run_and_with_any_number_of_threads(dtype):
    n, d, f, e = 1500, 64, 128, 8
    x, weight, up = random(n, d, dtype=dtype), random(e, d, dtype=dtype, seed=1), random(2 * n, f, dtype=dtype, seed=2)
    h, bias, gate = random(2 * n, f, dtype=dtype, seed=3), random(e, f, dtype=dtype, seed=4), random(2 * n, seed=5)
    images, shift = x.view(5, 300, d), random(5, d, dtype=dtype, seed=6)
    r = ops.route(x, weight, 2, False)

    def everything():
        def run(function, upstream, **inputs):
            return outcome(function, inputs, upstream)

        return [
            *run(lambda x, w: tuple(ops.route(x, w, 2, True)[i] for i in (0, 1, 6, 8)),
                 [random(n, e), random(n, 2), random(n), random(e)], x=x, w=weight),
            *run(lambda x: ops.gather_rows(x, r.order, r.position), [random(2 * n, d)], x=x),
            *run(lambda rows, gates, add, ada: ops.sum_rows(
                rows, r.order, r.position, gates, add=add, residual=add, ada_gate=ada),
                 [random(n, d)], rows=random(2 * n, d, dtype=dtype), gates=r.gates, add=x, ada=shift),
            *run(lambda h, up, gate: ops.expert_act(h, "swiglu", up, gate=gate), [up], h=h, up=up, gate=gate),
            *run(lambda h, bias, gate: ops.expert_act(h, "gelu", bias=bias, counts=r.counts, gate=gate), [up],
                 h=h, bias=bias, gate=gate),
            *run(ops.modulate, [images], x=images, shift=shift, scale=shift),
        ]  # fmt: skip

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5, 5):
            torch.set_num_threads(count)
            results.append(everything())
    finally:
        torch.set_num_threads(threads)
    # The two products of route's backward are the library's, which promises nothing across thread counts.
    own = [i for i in range(len(results[0])) if i not in (4, 5)]
    for other in results[1:]:
        assert all(torch.equal(results[0][i], other[i]) for i in own)
    assert all(torch.equal(a, b) for a, b in zip(results[2], results[3], strict=True))
