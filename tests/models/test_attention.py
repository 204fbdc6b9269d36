"""Attention against a loop over heads in numpy."""

import numpy as np
import torch

from dsmoe.models.attention import Attention


def test_attention_equals_a_numpy_loop_over_heads():
    torch.manual_seed(0)
    batch, count, dim, heads = 2, 5, 12, 3
    attention = Attention(dim, heads).double()
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
