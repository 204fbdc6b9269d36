"""Activation bytes by arithmetic against the tensors that autograd really saves."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch

from dsmoe import ops
from dsmoe.base.activations import backward_temporaries, block_input, saved_by_block, saved_outside_blocks
from dsmoe.base.presets import ModelSpec
from dsmoe.models.dit import Block, DiT
from dsmoe.moe.block import MoE

DENSE = ModelSpec(depth=2, dim=64, heads=4)
MOE = ModelSpec(depth=2, dim=64, heads=4, num_experts=4, shared_ratio=2.0)
GELU = ModelSpec(depth=2, dim=64, heads=4, num_experts=4, expert_kind="gelu", renormalize=True)
KINDS = {
    "dense": DENSE,
    "dense, q/k norms": dataclasses.replace(DENSE, qk_norm=True),
    "swiglu": MOE,
    "swiglu, one choice, no shared expert": dataclasses.replace(MOE, shared_ratio=0.0, top_k=1),
    "gelu": GELU,
    "gelu, q/k norms, three choices": dataclasses.replace(GELU, qk_norm=True, top_k=3),
}


class Saved:
    """Bytes of the distinct storages that a forward saves, those of `excluded` tensors left out."""

    def __init__(self, excluded):
        self._known = {t.untyped_storage().data_ptr() for t in excluded}
        self._kept = []  # a freed storage's address may come again
        self.bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self._kept.append(storage)
            self.bytes += storage.nbytes()
        return tensor


needs_kernels = pytest.mark.skipif(
    ("moe_ffn", "native") not in [(op, used) for op, used, _ in ops.implementations("cpu")],
    reason="the compiled operations are not built (make kernels)",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_kernels)], ids=["reference", "native"])
def test_a_block_saves_what_the_formula_says(kind, dtype, compiled):
    spec, images, tokens = KINDS[kind], 3, 16
    block = Block(spec, balance_scope="sample", moe_cls=MoE).to(dtype)
    x = torch.randn(images, tokens, spec.dim, dtype=dtype, requires_grad=True)
    c = torch.randn(images, spec.dim, dtype=dtype, requires_grad=True)
    saved = Saved([*block.parameters(), c])
    with saved.hooks, nullcontext() if compiled else ops.use("reference"):
        block(x, c)
    sizes = {"images": images, "tokens": tokens, "itemsize": dtype.itemsize}
    expected = saved_by_block(spec, **sizes, compiled=compiled)
    # The formula leaves out a few numbers an image.
    assert saved.bytes == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_model_saves_blocks_and_a_little_more(recompute, dtype):
    images, side = 4, 16
    model = DiT(MOE, input_size=side, in_channels=4, num_classes=10, learn_sigma=True).to(dtype)
    model.activation_checkpointing = recompute
    x, t = torch.randn(images, 4, side, side).to(dtype), torch.zeros(images)
    saved = Saved([*model.parameters(), *model.buffers()])
    with saved.hooks, ops.use("reference"):
        model(x, t, torch.zeros(images, dtype=torch.int64))
    sizes = {"images": images, "tokens": (side // 2) ** 2, "itemsize": dtype.itemsize}
    per_block = (block_input if recompute else saved_by_block)(MOE, **sizes)
    outside = saved_outside_blocks(MOE, channels=4, out_channels=8, **sizes)
    loss = 4 * images * side**2 * (2 * 8 + 8 * 4)  # not run here
    assert saved.bytes == pytest.approx(2 * per_block + outside - loss, rel=0.01)


def test_temporaries_of_a_dense_block_by_hand():
    """At fc2's backward: gradients of the block's output, of the branch, and of GELU's output."""
    assert backward_temporaries(DENSE, images=2, tokens=8, itemsize=2) == 2 * 16 * (64 + 64 + 256)
