"""A second opinion: diffusers' own DiT with our weights, its two published deviations set back (contracts 2.1.9)."""

import pytest
import torch

from dsmoe.base.presets import ModelSpec
from dsmoe.models.dit import DiT

# The import takes seconds, so it stands in a module of its own.
diffusers = pytest.importorskip("diffusers")

SPEC = ModelSpec(depth=2, dim=32, heads=2, patch=2)


def with_our_weights(ours):
    """diffusers' model; norm eps 1e-6 and 128 frequencies to the power i/128 instead of i/127, as DiT has them."""
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=SPEC.heads,
        attention_head_dim=SPEC.dim // SPEC.heads,
        in_channels=4,
        out_channels=8,
        num_layers=SPEC.depth,
        sample_size=8,
        patch_size=SPEC.patch,
        num_embeds_ada_norm=1000,
        norm_eps=1e-6,
    ).double()
    p = ours.state_dict()
    pairs = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    state = {}
    for i in range(SPEC.depth):
        there, here = f"transformer_blocks.{i}", f"blocks.{i}"
        embedder = f"{there}.norm1.emb"
        pairs |= {
            f"{there}.norm1.linear": f"{here}.adaLN_modulation.1",
            f"{there}.attn1.to_out.0": f"{here}.attn.proj",
            f"{there}.ff.net.0.proj": f"{here}.mlp.fc1",
            f"{there}.ff.net.2": f"{here}.mlp.fc2",
            f"{embedder}.timestep_embedder.linear_1": "t_embedder.mlp.0",
            f"{embedder}.timestep_embedder.linear_2": "t_embedder.mlp.2",
        }
        label = p["y_embedder.embedding_table.weight"]
        state[f"{embedder}.class_embedder.embedding_table.weight"] = label
        for leaf in ("weight", "bias"):
            q, k, v = p[f"{here}.attn.qkv.{leaf}"].chunk(3)
            for letter, value in zip("qkv", (q, k, v), strict=True):
                state[f"{there}.attn1.to_{letter}.{leaf}"] = value
    for there, here in pairs.items():
        state |= {f"{there}.{leaf}": p[f"{here}.{leaf}"] for leaf in ("weight", "bias")}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"pos_embed.pos_embed"}
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return theirs.eval()


def test_dense_model_equals_diffusers():
    """They make timestep features in fp32 as we do under fp32, so t is small enough for 1e-6."""
    torch.manual_seed(0)
    ours = DiT(SPEC, input_size=8, in_channels=4, num_classes=1000, learn_sigma=True).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    t, y = torch.tensor([0, 1, 7]), torch.tensor([5, 1000, 999])
    with torch.no_grad():
        got, _ = ours(x, t, y)
        expected = with_our_weights(ours)(x, timestep=t, class_labels=y).sample
    assert got.abs().max() > 0.5
    # One fp32 rounding of angles below 8 and of features below 1, through two layers: 1e-6 of the output.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
