"""Attention against a loop over heads in numpy."""

import numpy as np
import pytest
import torch

from dsmoe.models.attention import Attention


def normalised(x, weight, bias):
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6) * weight + bias


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_equals_a_numpy_loop_over_heads(qk_norm):
    """With qk_norm this is the released DiT-MoE XL and G: rows of Wqkv in the order (q|k|v, head, feature)."""
    torch.manual_seed(0)
    batch, count, dim, heads = 2, 5, 12, 3
    attention = Attention(dim, heads, qk_norm=qk_norm).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_()
    x = torch.randn(batch, count, dim, dtype=torch.float64)
    got = attention(x).detach().numpy()
    p = {k: v.numpy() for k, v in attention.state_dict().items()}
    size = dim // heads
    for b in range(batch):
        qkv = x[b].numpy() @ p["qkv.weight"].T + p["qkv.bias"]
        heads_out = []
        for h in range(heads):
            # Outputs of qkv: all of q, then all of k, then all of v; within each, head after head.
            q, k, v = (qkv[:, part * dim + h * size : part * dim + (h + 1) * size] for part in range(3))
            if qk_norm:
                q = normalised(q, p["q_norm.weight"], p["q_norm.bias"])
                k = normalised(k, p["k_norm.weight"], p["k_norm.bias"])
            scores = q @ k.T / np.sqrt(size)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads_out.append(weights / weights.sum(axis=1, keepdims=True) @ v)
        expected = np.concatenate(heads_out, axis=1) @ p["proj.weight"].T + p["proj.bias"]
        np.testing.assert_allclose(got[b], expected, rtol=0, atol=1e-12)


def test_bias_of_keys_has_no_effect():
    """It adds the same number to every score of a query; the invariance tests rely on this direction."""
    torch.manual_seed(0)
    attention = Attention(8, 2).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    before = attention(x)
    with torch.no_grad():
        attention.qkv.bias[8:16] += 3.0
    torch.testing.assert_close(attention(x), before, rtol=0, atol=1e-12)


def test_with_norms_the_bias_of_the_key_norm_has_no_effect_and_that_of_keys_has():
    torch.manual_seed(0)
    attention = Attention(8, 2, qk_norm=True).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    before = attention(x)
    gradients = torch.autograd.grad(before.square().sum(), [attention.k_norm.bias, attention.q_norm.bias])
    assert gradients[0].abs().max() < 1e-12 < 1e-3 < gradients[1].abs().max()
    with torch.no_grad():
        attention.k_norm.bias += 3.0
        torch.testing.assert_close(attention(x), before, rtol=0, atol=1e-12)
        attention.qkv.bias[8:16] += torch.arange(8)
    assert (attention(x) - before).abs().max() > 1e-3


def test_head_norms_have_the_published_keys_and_start_as_ones_and_zeros():
    state = Attention(12, 3, qk_norm=True).state_dict()
    assert set(state) - set(Attention(12, 3).state_dict()) == {
        f"{norm}.{leaf}" for norm in ("q_norm", "k_norm") for leaf in ("weight", "bias")
    }
    for norm in ("q_norm", "k_norm"):
        assert torch.equal(state[f"{norm}.weight"], torch.ones(4))
        assert torch.equal(state[f"{norm}.bias"], torch.zeros(4))


def test_head_norm_of_bf16_weights_is_computed_in_fp32_and_rounded_once():
    """Within one rounding of the result, 2^-8, of the norm in fp64, however much its terms cancel."""
    torch.manual_seed(0)
    norm = Attention(128, 2, qk_norm=True).bfloat16().q_norm
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_(std=8.0)
    x = torch.randn(500, 64).bfloat16()
    got = norm(x)
    expected = normalised(*(t.detach().double().numpy() for t in (x, norm.weight, norm.bias)))
    assert got.dtype == torch.bfloat16
    np.testing.assert_allclose(got.detach().double().numpy(), expected, rtol=2**-8, atol=1e-5)
