"""What torch knows of the compiled operations: schemas, fakes, gradients; and what they tell of themselves."""

import pytest
import torch
from fp64_truth import needs_kernels
from op_inputs import random, routed

from dsmoe import ops
from dsmoe.ops import native
from dsmoe.ops.native import ffn

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@needs_kernels
@DTYPES
def test_opcheck(dtype):
    """Schema, fake, autograd registration and dynamic shapes under AOT dispatch, by torch's own checker."""
    op, d, f, r = torch.ops.dsmoe, 24, 40, routed(50, 8, 2)
    grad = {"requires_grad": True}

    def leaf(*shape, seed=0):
        return random(*shape, dtype=dtype, seed=seed).requires_grad_()

    x, rows, h, gates = leaf(50, d), leaf(100, d), leaf(100, f), r.gates.detach().requires_grad_()
    row_gate = torch.rand(100, **grad)
    stacks = (leaf(8, f, d), leaf(8, d, f))
    places = (x, gates, r.indices, r.order, r.position, r.counts, r.ends)
    calls = [
        (op.route, (x, leaf(8, d), 2, True, None)),
        (op.gather_rows, (x, r.order, r.position)),
        (op.sum_rows, (rows, r.position, gates, leaf(50, d), leaf(50, d), leaf(5, d), False, True)),
        (op.sum_rows, (rows, r.position, None, None, None, None, True, False)),
        (op.expert_act, (h, 0, leaf(100, f), None, None, row_gate)),
        (op.expert_act, (h, 1, None, leaf(8, f), r.ends, None)),
        (op.modulate, (leaf(2, 70, d), leaf(2, d), leaf(2, d))),
        (op.grouped_mm, (rows, leaf(8, d, f), r.counts, False)),
    ]
    alone, shared, ends = (None,) * 3, (leaf(10, d), leaf(d, 10), leaf(10, d)), (leaf(50, d), leaf(5, d))
    swiglu, gelu, library = (*stacks, leaf(8, f, d)), (*stacks, leaf(8, 1, f + d)), ffn.LIBRARY
    calls += [
        (op.moe_ffn, (*places, *weights, *how))
        for weights, how in (
            ((*swiglu, *alone), (None, None, False, 0, library, True)),
            ((*swiglu, *shared), (None, None, False, 0, library, True)),
            ((*gelu, *alone), (None, None, False, 1, library, False)),
            ((*swiglu, *shared), (*ends, True, 0, library, True)),
            ((*swiglu, *shared), (*ends, True, 0, ffn.GLU, False)),
            ((*swiglu, *shared), (*ends, True, 0, ffn.BLOCKS, True)),
            ((*swiglu, *alone), (None, None, False, 0, ffn.BLOCKS, False)),
            ((*gelu, *shared), (*ends, True, 1, library, False)),
        )
    ]
    for packet, arguments in calls:
        torch.library.opcheck(packet.default, arguments)


@needs_kernels
def test_a_second_derivative_is_refused():
    x, up = random(8, 8).requires_grad_(), random(8, 8, seed=1).requires_grad_()
    r = routed(4, 4, 2)
    calls = {
        "expert_act": lambda: ops.expert_act(x, "swiglu", up),
        "sum_rows": lambda: ops.sum_rows(x, r.order, r.position, r.gates.detach().requires_grad_()),
        "modulate": lambda: ops.modulate(x[None], up[:1], up[1:2]),
        "route": lambda: ops.route(x, up, 2, False).probs,
        "moe_ffn": lambda: ops.moe_ffn(x, routed(8, 1, 1), (up[None],) * 3, "swiglu"),
    }
    for name, call in calls.items():
        (gradient,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=rf"dsmoe::{name}_backward has no gradient"):
            gradient.sum().backward()


def test_the_state_of_the_compiled_file_is_told():
    text = ops.kernels()
    assert ("of these sources" in text and native.LIBRARY.isa in text) or "make kernels" in text
