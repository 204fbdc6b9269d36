"""The model in fp32, bf16 and fp64: rounding against plain arithmetic, storage and constants."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from models.small_dit import CHANNELS, CLASSES, DENSE, GELU_MOE, MOE, QK_NORM_MOE, SIDE, batch, build

from dsmoe.models.dit import DiT
from dsmoe.models.embedders import unpatchify


def plain_forward(model, x, t, y):
    """The dense model with every operation in the dtype of its weights, constants and softmax included."""
    p, spec = dict(model.named_parameters()), model.spec
    dtype = x.dtype

    def linear(name, h):
        return F.linear(h, p[f"{name}.weight"], p[f"{name}.bias"])

    def modulated(h, shift, scale):
        return F.layer_norm(h, (spec.dim,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    tokens = F.conv2d(x, p["x_embedder.proj.weight"], p["x_embedder.proj.bias"], stride=spec.patch)
    tokens = tokens.flatten(2).transpose(1, 2) + model.pos_embed.to(dtype)
    angles = t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    c = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype))
    c = F.silu(linear("t_embedder.mlp.2", F.silu(c)) + p["y_embedder.embedding_table.weight"][y])
    for i in range(spec.depth):
        m = linear(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, dim=1)
        h = linear(f"blocks.{i}.attn.qkv", modulated(tokens, m[0], m[1]))
        q, k, v = h.unflatten(2, (3, spec.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) * (spec.dim // spec.heads) ** -0.5).softmax(-1)
        h = linear(f"blocks.{i}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        tokens = tokens + m[2][:, None] * h
        h = F.gelu(linear(f"blocks.{i}.mlp.fc1", modulated(tokens, m[3], m[4])), approximate="tanh")
        tokens = tokens + m[5][:, None] * linear(f"blocks.{i}.mlp.fc2", h)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    return unpatchify(linear("final_layer.linear", modulated(tokens, shift, scale)), spec.patch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_error_is_at_most_twice_that_of_plain_arithmetic(dtype):
    """Error against fp64 with the same weights, root mean square over eight models of depth six."""
    ours = plain = 0.0
    for seed in range(8):
        model = build(dataclasses.replace(DENSE, depth=6), dtype=dtype, seed=seed)
        x, t, y = batch(dtype=dtype, seed=seed)
        with torch.no_grad():
            out, rough = model(x, t, y)[0], plain_forward(model, x, t, y)
            assert out.dtype == dtype
            truth = model.double()(x.double(), t, y)[0]
        ours += (out.double() - truth).square().mean().item()
        plain += (rough.double() - truth).square().mean().item()
    assert math.sqrt(ours) <= 2 * math.sqrt(plain)
    assert ours > 0


@pytest.mark.parametrize("spec", [DENSE, MOE, GELU_MOE, QK_NORM_MOE], ids=["dense", "swiglu", "gelu", "qk_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_storage_dtype_of_outputs_gradients_and_constants(spec, dtype):
    model = build(spec, dtype=dtype)
    x, t, y = batch(dtype=torch.float32)
    out, stats = model(x, t, y)
    out.float().square().mean().backward()
    assert out.dtype == dtype
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    assert model.pos_embed.dtype == model.t_embedder.frequencies.dtype == torch.float32
    if stats is not None:
        assert {s.dtype for s in stats[2:]} == {torch.float32}


def test_fp64_as_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        model = DiT(MOE, input_size=SIDE, in_channels=CHANNELS, num_classes=CLASSES, learn_sigma=False)
        out, _ = model(*batch())
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {out.dtype} == {torch.float64}
    assert out.shape == (3, CHANNELS, SIDE, SIDE)
    assert model.pos_embed.dtype == torch.float32
