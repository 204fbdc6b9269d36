"""Embedders against formulas written out element by element."""

import math

import numpy as np
import pytest
import torch

from dsmoe.models.embedders import (
    FixedBufferModule,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    position_embedding,
    unpatchify,
)


def test_position_embedding_equals_the_formula_element_by_element():
    dim, grid = 24, 5
    got = position_embedding(dim, grid)
    assert got.shape == (grid * grid, dim)
    assert got.dtype == np.float64
    quarter = dim // 4
    for row in range(grid):
        for column in range(grid):
            for feature in range(dim):
                # First half: column ("w goes first"); in each half first sines, then cosines.
                coordinate = column if feature < dim // 2 else row
                within = feature % (dim // 2)
                angle = coordinate / 10000 ** ((within % quarter) / quarter)
                expected = math.sin(angle) if within < quarter else math.cos(angle)
                assert got[row * grid + column, feature] == pytest.approx(expected, abs=1e-15)


def test_position_grid_is_not_rescaled_for_larger_images():
    small, large = position_embedding(16, 4).reshape(4, 4, 16), position_embedding(16, 8).reshape(8, 8, 16)
    assert np.array_equal(small, large[:4, :4])


def test_unpatchify_equals_nested_loops():
    batch, grid, patch, channels = 2, 3, 2, 5
    tokens = torch.arange(batch * grid**2 * patch**2 * channels, dtype=torch.float32)
    tokens = tokens.view(batch, grid**2, patch**2 * channels)
    got = unpatchify(tokens, patch)
    assert got.shape == (batch, channels, grid * patch, grid * patch)
    for b in range(batch):
        for h in range(grid):
            for w in range(grid):
                for p in range(patch):
                    for q in range(patch):
                        for c in range(channels):
                            value = tokens[b, h * grid + w, (p * patch + q) * channels + c]
                            assert got[b, c, h * patch + p, w * patch + q] == value


def test_patch_embed_is_row_major_tokens_of_channel_first_patches():
    embed = PatchEmbed(channels=3, dim=8, patch=2).double()
    with torch.no_grad():
        embed.proj.bias.normal_()
    image = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    got = embed(image).detach().numpy()
    weight, bias = embed.proj.weight.detach().numpy(), embed.proj.bias.detach().numpy()
    for b in range(2):
        for h in range(3):
            for w in range(3):
                patch = image[b, :, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].numpy()
                expected = weight.reshape(8, 12) @ patch.reshape(12) + bias
                np.testing.assert_allclose(got[b, h * 3 + w], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("t", [0, 1, 499.5, 999, 0.25])
def test_timestep_features_equal_the_closed_form(t):
    """The angle is t * f with f rounded to fp32 and one more fp32 product: off by at most t * 2^-23."""
    got = TimestepEmbedder(8).features(torch.tensor([t]))[0]
    assert got.dtype == torch.float32
    for i in range(128):
        angle = t * math.exp(-math.log(10000) * i / 128)
        assert got[i].item() == pytest.approx(math.cos(angle), abs=2e-7 + t * 2**-23)
        assert got[128 + i].item() == pytest.approx(math.sin(angle), abs=2e-7 + t * 2**-23)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_timestep_may_have_any_number_type(dtype):
    embedder = TimestepEmbedder(8)
    t = torch.tensor([0, 3, 999])
    assert torch.allclose(embedder(t.to(dtype)), embedder(t.float()), rtol=0, atol=1e-6)


def test_timestep_features_keep_fp32_precision_under_bf16_storage():
    """In bf16, 999 would become 1000 and the fastest feature would be lost altogether."""
    embedder = TimestepEmbedder(8).bfloat16()
    got = embedder.features(torch.tensor([999]))[0]
    assert got.dtype == torch.float32
    assert got[0].item() == pytest.approx(math.cos(999), abs=2e-4)
    assert abs(math.cos(1000) - math.cos(999)) > 0.4
    assert embedder(torch.tensor([999])).dtype == torch.bfloat16


def test_null_label_is_the_last_row_and_can_be_left_out():
    with_null, without = LabelEmbedder(10, 8, True), LabelEmbedder(10, 8, False)
    assert torch.equal(with_null(torch.tensor([10]))[0], with_null.embedding_table.weight[10])
    assert without.embedding_table.weight.shape == (10, 8)
    with pytest.raises(IndexError):
        without(torch.tensor([10]))


def test_fixed_buffers_keep_their_fp32_values_through_casts_and_to_empty():
    values = np.linspace(0, 1, 7)
    module = FixedBufferModule()
    module.register_fixed("table", values)
    expected = torch.from_numpy(values.astype(np.float32))
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double):
        assert torch.equal(cast(module).table, expected)
        assert module.table.dtype == torch.float32
    assert module.to("meta").table.is_meta
    assert torch.equal(module.to_empty(device="cpu").table, expected)
    assert module.state_dict() == {}
