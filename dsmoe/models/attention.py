"""Multi-head self-attention with timm's parameter layout. No mask, no dropout, no cache."""

import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe.models.embedders import Linear

HEAD_NORM_EPS = 1e-6  # contracts 2.2


class Attention(nn.Module):
    """Self-attention over tokens, scale head_dim^-0.5 (contracts 2.1.1).

    `qkv` is one [3D, D] layer whose outputs are ordered (q|k|v, head, feature). The product runs in the
    storage dtype through torch's scaled_dot_product_attention, whose softmax accumulates in fp32.

    With `qk_norm`, LayerNorms `q_norm` and `k_norm` go over the features of each head's queries and keys (contracts
    2.2); torch computes them in fp32 and rounds once. The true gradient of `k_norm.bias` is zero, since it adds one
    number to all scores of a query; without the norm that holds for the K third of `qkv.bias`, with it no longer.
    """

    def __init__(self, dim: int, heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        assert dim % heads == 0, (dim, heads)
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // heads, eps=HEAD_NORM_EPS) if qk_norm else None
        self.k_norm = nn.LayerNorm(dim // heads, eps=HEAD_NORM_EPS) if qk_norm else None
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        batch, count, dim = x.shape
        qkv = self.qkv(x).view(batch, count, 3, self.heads, dim // self.heads)
        q_BHTd, k_BHTd, v_BHTd = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_norm is not None:
            q_BHTd, k_BHTd = self.q_norm(q_BHTd), self.k_norm(k_BHTd)
        out_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd)
        return self.proj(out_BHTd.transpose(1, 2).reshape(batch, count, dim))
