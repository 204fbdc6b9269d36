"""Holding an implementation against float64: its error is at most twice that of plain torch in the same dtype."""

import pytest
import torch

from dsmoe import ops
from dsmoe.ops import native

needs_kernels = pytest.mark.skipif(not native.DEVICES, reason=f"compiled operations: {ops.kernels()}")
BOTH = ["reference", pytest.param("native", marks=needs_kernels)]


def outcome(function, inputs, upstream, dtype=None):
    """Outputs of function(**inputs), and gradients of the floating inputs for these upstream gradients (one an output).

    dtype: everything floating is converted to it first.
    """
    cast = {
        name: t.detach().to(dtype or t.dtype).requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t
        for name, t in inputs.items()
    }
    outputs = function(**cast)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [t for t in cast.values() if torch.is_tensor(t) and t.requires_grad]
    carrying = [(out, up.to(out.dtype)) for out, up in zip(outputs, upstream, strict=True) if out.requires_grad]
    gradients = ()
    if carrying:
        heads, upstream = zip(*carrying, strict=True)
        gradients = torch.autograd.grad(heads, leaves, upstream, allow_unused=True)
    return [*(out.detach() for out in outputs), *(g for g in gradients if g is not None)]


def assert_right(function, inputs, upstream):
    """function runs whatever implementation is in force; truth and yardstick are the reference in fp64 and in the
    inputs' own dtype. RMS of the error, with half a unit in the last place as the floor: plain torch may be exact."""
    found = outcome(function, inputs, upstream)
    with ops.use("reference"):
        plain = outcome(function, inputs, upstream)
        truth = outcome(function, inputs, upstream, torch.float64)
    assert len(found) == len(plain) == len(truth)
    for position, (mine, theirs, exact) in enumerate(zip(found, plain, truth, strict=True)):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), position
        if mine.numel() == 0:
            continue
        error, allowed = ((t.double() - exact).square().mean().sqrt() for t in (mine, theirs))
        floor = torch.finfo(mine.dtype).eps / 2 * exact.square().mean().sqrt()
        assert error <= 2 * torch.maximum(allowed, floor), (position, error.item(), allowed.item(), floor.item())
