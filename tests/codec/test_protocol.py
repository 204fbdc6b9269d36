"""Posterior and the checks every codec shares."""

import math
from pathlib import Path

import pytest
import torch

from dsmoe.base.errors import ConfigError
from dsmoe.codec import NAMES, Codec, Posterior, build
from dsmoe.codec.protocol import provenance


def test_sample_is_mean_plus_std_times_noise() -> None:
    mean = torch.tensor([[[[1.0, -2.0]]]])
    std = torch.tensor([[[[0.5, 0.25]]]])
    noise = torch.tensor([[[[2.0, -4.0]]]])
    assert Posterior(mean, std).sample(noise).flatten().tolist() == [2.0, -3.0]


def test_sample_with_zero_std_is_the_mean() -> None:
    mean = torch.randn(2, 4, 3, 3)
    assert torch.equal(Posterior(mean, torch.zeros_like(mean)).sample(torch.randn(2, 4, 3, 3)), mean)


def test_sample_has_the_posterior_moments() -> None:
    posterior = Posterior(torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), 0.5))
    draw = posterior.sample(torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(1)))
    # standard errors of mean and std of n draws: s / sqrt(n) and s / sqrt(2 n); six of them are allowed
    assert abs(float(draw.mean()) - 3.0) < 6 * 0.5 / 200
    assert abs(float(draw.std()) - 0.5) < 6 * 0.5 / (200 * math.sqrt(2))


def test_sample_refuses_noise_that_would_broadcast() -> None:
    posterior = Posterior(torch.zeros(2, 4, 3, 3), torch.ones(2, 4, 3, 3))
    with pytest.raises(ValueError, match=r"\(1, 4, 3, 3\)"):
        posterior.sample(torch.zeros(1, 4, 3, 3))


def test_provenance_is_strings_and_exact() -> None:
    record = provenance("x", "ab", 0.18215, 8)
    assert record == {"name": "x", "sha256": "ab", "scale": "0.18215", "factor": "8"}
    assert float(record["scale"]) == 0.18215


@pytest.fixture(params=["kl-small", "none"])
def codec(request: pytest.FixtureRequest) -> Codec:
    return build(request.param)


def test_every_codec_meets_the_protocol(codec: Codec) -> None:
    assert isinstance(codec, Codec)
    assert codec.name in NAMES
    assert set(codec.provenance) == {"name", "sha256", "scale", "factor"}
    assert all(isinstance(value, str) for value in codec.provenance.values())
    assert codec.to("cpu") is codec
    images = (torch.rand(2, 3, 32, 48) * 2 - 1).requires_grad_()
    posterior = codec.encode(images)
    shape = (2, codec.channels, 32 // codec.factor, 48 // codec.factor)
    assert posterior.mean.shape == posterior.std.shape == shape
    assert posterior.mean.dtype == posterior.std.dtype == torch.float32
    assert (posterior.std >= 0).all()
    decoded = codec.decode(posterior.mean.requires_grad_())
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.float32
    assert not decoded.requires_grad
    assert not codec.encode(images).mean.requires_grad


def test_half_precision_input_gives_fp32_output(codec: Codec) -> None:
    posterior = codec.encode(torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16))
    assert posterior.mean.dtype == torch.float32
    assert codec.decode(posterior.mean.to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 16, 16, 3), (1, 3, 0, 16)])
def test_images_of_another_shape_are_refused(codec: Codec, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        codec.encode(torch.zeros(shape))


def test_byte_images_are_refused(codec: Codec) -> None:
    with pytest.raises(ConfigError, match="uint8"):
        codec.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("size", [(16, 12), (12, 16), (20, 20)])
def test_sides_must_be_multiples(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"{size[0]}x{size[1]}.*multiples of 8"):
        build("kl-small").encode(torch.zeros(1, 3, *size))


def test_latents_of_another_shape_are_refused(codec: Codec) -> None:
    with pytest.raises(ConfigError, match=str(codec.channels)):
        codec.decode(torch.zeros(1, codec.channels + 1, 4, 4))
    with pytest.raises(ConfigError):
        codec.decode(torch.zeros(codec.channels, 4, 4))


def test_codecs_never_name_the_machine(repo_root: Path) -> None:
    for file in (repo_root / "dsmoe" / "codec").glob("*.py"):
        assert str(repo_root.parent) not in file.read_text()
