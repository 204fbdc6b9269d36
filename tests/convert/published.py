"""Published checkpoints for tests: keys and shapes written out from contracts 2.1-2.3, and a plain forward pass.

Nothing here comes from dsmoe: the key lists and the arithmetic are the other side of what the converters say.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BLOCK = {
    "attn.qkv.weight": "3D D",
    "attn.qkv.bias": "3D",
    "attn.proj.weight": "D D",
    "attn.proj.bias": "D",
    "adaLN_modulation.1.weight": "6D D",
    "adaLN_modulation.1.bias": "6D",
}
FLASH_BLOCK = {
    "attn.Wqkv.weight": "3D D",
    "attn.Wqkv.bias": "3D",
    "attn.out_proj.weight": "D D",
    "attn.out_proj.bias": "D",
    "attn.q_norm.weight": "h",
    "attn.q_norm.bias": "h",
    "attn.k_norm.weight": "h",
    "attn.k_norm.bias": "h",
    "adaLN_modulation.1.weight": "6D D",
    "adaLN_modulation.1.bias": "6D",
}
MLP = {"fc1.weight": "4D D", "fc1.bias": "4D", "fc2.weight": "D 4D", "fc2.bias": "D"}
EXPERT = {"gate_proj.weight": "4D D", "up_proj.weight": "4D D", "down_proj.weight": "D 4D"}
SHARED = {"gate_proj.weight": "2D D", "up_proj.weight": "2D D", "down_proj.weight": "D 2D"}
REST = {
    "pos_embed": "1 T D",
    "t_embedder.mlp.0.weight": "D 256",
    "t_embedder.mlp.0.bias": "D",
    "t_embedder.mlp.2.weight": "D D",
    "t_embedder.mlp.2.bias": "D",
    "y_embedder.embedding_table.weight": "rows D",
    "final_layer.linear.weight": "ppout D",
    "final_layer.linear.bias": "ppout",
    "final_layer.adaLN_modulation.1.weight": "2D D",
    "final_layer.adaLN_modulation.1.bias": "2D",
}
ONE_CONV = {"x_embedder.proj.weight": "D in p p", "x_embedder.proj.bias": "D"}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A published checkpoint. feed: mlp, swiglu or gelu (experts). convs: patch convolutions, 0 for the plain one."""

    depth: int
    dim: int
    heads: int
    tokens: int
    feed: str = "mlp"
    flash: bool = False
    experts: int = 0
    convs: int = 0
    rows: int = 1001
    patch: int = 2
    inputs: int = 4
    outputs: int = 8

    @property
    def side(self) -> int:
        return math.isqrt(self.tokens) * self.patch


# The released ones (contracts 2.1-2.3), 256 px but for the generalist's 512.
RELEASED = {
    "XL/2": Kind(depth=28, dim=1152, heads=16, tokens=256),
    "S/2-8E2A": Kind(depth=12, dim=384, heads=6, tokens=256, feed="swiglu", experts=8),
    "G/2-16E2A": Kind(depth=40, dim=1408, heads=16, tokens=256, feed="swiglu", experts=16, flash=True),
    "XL-8E2A-generalist": Kind(
        depth=28, dim=1152, heads=16, tokens=1024, feed="gelu", experts=8, convs=4, rows=1005, inputs=12
    ),
}
# The same families, small.
SMALL = {
    "dit": Kind(depth=2, dim=16, heads=2, tokens=16),
    "dit-moe-timm": Kind(depth=2, dim=16, heads=2, tokens=16, feed="swiglu", experts=3),
    "dit-moe-flash": Kind(depth=2, dim=16, heads=2, tokens=16, feed="swiglu", experts=3, flash=True),
    "generalist": Kind(depth=2, dim=16, heads=2, tokens=16, feed="gelu", experts=3, convs=4, rows=1005, inputs=12),
}


def shapes(kind):
    """Every key and its shape."""
    sizes = {f"{n}D": n * kind.dim for n in (2, 3, 4, 6)} | {"D": kind.dim, "h": kind.dim // kind.heads}
    sizes |= {"T": kind.tokens, "rows": kind.rows, "p": kind.patch, "in": kind.inputs, "E": kind.experts}
    sizes["ppout"] = kind.patch**2 * kind.outputs
    keys = dict(REST)
    for conv in range(1, kind.convs + 1):
        keys |= {f"x_embedder.proj.conv_in_{conv}.{k.rpartition('.')[2]}": s for k, s in ONE_CONV.items()}
    keys |= {} if kind.convs else ONE_CONV
    for i in range(kind.depth):
        block = dict(FLASH_BLOCK if kind.flash else BLOCK)
        if kind.feed == "mlp":
            block |= {f"mlp.{k}": s for k, s in MLP.items()}
        else:
            block["moe.gate.weight"] = "E D"
            one = EXPERT if kind.feed == "swiglu" else MLP
            block |= {f"moe.experts.{e}.{k}": s for e in range(kind.experts) for k, s in one.items()}
        if kind.feed == "swiglu":
            block |= {f"moe.shared_experts.{k}": s for k, s in SHARED.items()}
        keys |= {f"blocks.{i}.{k}": s for k, s in block.items()}
    return {key: tuple(sizes[s] if s in sizes else int(s) for s in text.split()) for key, text in keys.items()}


def table(kind):
    """The 2-D sine-cosine embedding, element by element (contracts 2.1.4)."""
    grid, quarter = math.isqrt(kind.tokens), kind.dim // 4
    found = torch.empty(1, kind.tokens, kind.dim, dtype=torch.float64)
    for row in range(grid):
        for column in range(grid):
            for feature in range(kind.dim):
                coordinate = column if feature < kind.dim // 2 else row
                wave = math.sin if feature % (kind.dim // 2) < quarter else math.cos
                found[0, row * grid + column, feature] = wave(coordinate / 10000 ** (feature % quarter / quarter))
    return found.float()


def weights(kind, seed=0, dtype=torch.float32):
    """Random tensors with the published names."""
    generator = torch.Generator().manual_seed(seed)
    state = {key: (0.3 * torch.randn(shape, generator=generator)).to(dtype) for key, shape in shapes(kind).items()}
    return state | {"pos_embed": table(kind)}


def _norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def _attention(p, name, x, kind):
    """One head at a time, by softmax(q k / sqrt(h)) v."""
    qkv = _linear(p, f"{name}.{'Wqkv' if kind.flash else 'qkv'}", x)
    h, heads = kind.dim // kind.heads, []
    for i in range(kind.heads):
        q, k, v = (qkv[..., part * kind.dim + i * h : part * kind.dim + (i + 1) * h] for part in range(3))
        if kind.flash:
            q = F.layer_norm(q, (h,), p[f"{name}.q_norm.weight"], p[f"{name}.q_norm.bias"], eps=1e-6)
            k = F.layer_norm(k, (h,), p[f"{name}.k_norm.weight"], p[f"{name}.k_norm.bias"], eps=1e-6)
        heads.append(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(h), -1) @ v)
    return _linear(p, f"{name}.{'out_proj' if kind.flash else 'proj'}", torch.cat(heads, -1))


def _mlp(p, name, x):
    return _linear(p, f"{name}.fc2", F.gelu(_linear(p, f"{name}.fc1", x), approximate="tanh"))


def _swiglu(p, name, x):
    return _linear(
        p, f"{name}.down_proj", F.silu(_linear(p, f"{name}.gate_proj", x)) * _linear(p, f"{name}.up_proj", x)
    )


def _experts(p, name, x, kind):
    """Every token by itself: the two most probable experts, weighted by their plain probabilities."""
    one = _swiglu if kind.feed == "swiglu" else _mlp
    out = torch.zeros_like(x)
    probabilities = torch.softmax(_linear(p, f"{name}.gate", x), -1)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            values, chosen = probabilities[b, t].topk(2)
            for value, expert in zip(values, chosen.tolist(), strict=True):
                out[b, t] += value * one(p, f"{name}.experts.{expert}", x[b, t])
    return out + _swiglu(p, f"{name}.shared_experts", x) if kind.feed == "swiglu" else out


def forward(state, kind, x, t, y):
    """The published forward pass in fp64: x [B, in, S, S], t [B], y [B] to [B, out, S, S]."""
    p = {key: value.double() for key, value in state.items()}
    tokens = []
    for i, label in enumerate(y.tolist()):
        conv = f".conv_in_{label - 1000 + 1}" if kind.convs else ""
        weight, bias = p[f"x_embedder.proj{conv}.weight"], p[f"x_embedder.proj{conv}.bias"]
        tokens.append(F.conv2d(x[i : i + 1], weight, bias, stride=kind.patch).flatten(2).transpose(1, 2))
    h = torch.cat(tokens) + p["pos_embed"]
    # The model's frequencies are fp32 (contracts 2.1.3: torch's default); angles are then exact products in fp64.
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128).float().double()
    angles = t.double()[:, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], 1)
    c = _linear(p, "t_embedder.mlp.2", F.silu(_linear(p, "t_embedder.mlp.0", features)))
    c = F.silu(c + p["y_embedder.embedding_table.weight"][y])
    for i in range(kind.depth):
        name = f"blocks.{i}"
        sm, cm, gm, sp, cp, gp = _linear(p, f"{name}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        h = h + gm * _attention(p, f"{name}.attn", _norm(h) * (1 + cm) + sm, kind)
        inner = _norm(h) * (1 + cp) + sp
        feed = _mlp(p, f"{name}.mlp", inner) if kind.feed == "mlp" else _experts(p, f"{name}.moe", inner, kind)
        h = h + gp * feed
    shift, scale = _linear(p, "final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    h = _linear(p, "final_layer.linear", _norm(h) * (1 + scale) + shift)
    grid, q = math.isqrt(kind.tokens), kind.patch
    return torch.einsum("nhwpqc->nchpwq", h.reshape(len(h), grid, grid, q, q, kind.outputs)).reshape(
        len(h), kind.outputs, grid * q, grid * q
    )
