"""Our own autoencoder: the codec around the network, and what the committed weights are worth."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmoe.base.errors import CheckpointError
from dsmoe.codec.files import file_sha256
from dsmoe.codec.kl import FORMAT, WEIGHTS, KLAutoencoder, KLCodec
from dsmoe.codec.quality import psnr, reconstruction_psnr
from dsmoe.data.scenes import Scenes

DOCUMENTED_PSNR = 28.90  # docs/codecs.md: mean over these 64 scenes
MARGIN = 0.1  # other CPUs sum convolutions in another order; that moves single pixels, not the mean


@pytest.fixture(scope="module")
def codec() -> KLCodec:
    return KLCodec()


@pytest.fixture(scope="module")
def scenes() -> torch.Tensor:
    """64 held-out scenes at 64 px, fp32 [64, 3, 64, 64] in [-1, 1]."""
    pictures = Scenes("validation", 64)
    arrays = np.stack([pictures.read(i)[0] for i in range(64)])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def _made_up(file: Path, scale: str = "0.5", **metadata: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    tensors = KLAutoencoder().state_dict()
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, _notes(scale, **metadata))
    return tensors


def _notes(scale: str, **metadata: str) -> dict[str, str]:
    return {"format": FORMAT, "scale": scale, **metadata}


def test_committed_weights_reach_the_documented_psnr(codec: KLCodec, scenes: torch.Tensor) -> None:
    assert float(reconstruction_psnr(codec, scenes).mean()) > DOCUMENTED_PSNR - MARGIN


def test_the_page_describes_the_committed_file(codec: KLCodec, repo_root: Path) -> None:
    page = (repo_root / "docs" / "codecs.md").read_text()
    assert codec.provenance["sha256"] == file_sha256(WEIGHTS)
    assert codec.provenance["sha256"] in page
    assert f"{DOCUMENTED_PSNR:.2f} dB" in page
    assert WEIGHTS.stat().st_size < 4 * 2**20


def test_scaled_latents_are_about_unit_and_no_channel_is_degenerate(codec: KLCodec, scenes: torch.Tensor) -> None:
    posterior = codec.encode(scenes)
    latents = posterior.sample(torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0)))
    assert 0.9 < float(latents.std()) < 1.1
    for channel in latents.unbind(1):
        assert 0.5 < float(channel.std()) < 1.6
        assert abs(float(channel.mean())) < 1.0
    assert 0.005 < float(posterior.std.mean()) < 0.3


def test_noise_on_latents_does_not_destroy_the_picture(codec: KLCodec, scenes: torch.Tensor) -> None:
    """A diffusion model's latents are never exact: noise of a tenth of their spread may cost 1.5 dB at most."""
    latents = codec.encode(scenes).mean
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    clean = psnr(scenes, codec.decode(latents)).mean()
    noisy = psnr(scenes, codec.decode(latents + 0.1 * noise)).mean()
    assert clean - noisy < 1.5


def test_batch_and_size_are_free(codec: KLCodec, scenes: torch.Tensor) -> None:
    latents = codec.encode(scenes[:3]).mean
    # fp32 convolutions summed in another order: a few hundred terms, values of order one
    torch.testing.assert_close(codec.encode(scenes[1:2]).mean, latents[1:2], rtol=0, atol=2e-5)
    wide = codec.encode(torch.zeros(1, 3, 24, 40))
    assert wide.mean.shape == (1, 4, 3, 5)
    assert codec.decode(wide.mean).shape == (1, 3, 24, 40)


def test_scale_multiplies_what_encode_gives_and_divides_what_decode_takes(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    tensors = _made_up(file, "0.5")
    codec = KLCodec(file)
    network = KLAutoencoder()
    network.load_state_dict(tensors)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean, log_variance = network.moments(images)
        expected = network.reconstruct(mean)
    posterior = codec.encode(images)
    assert torch.equal(posterior.mean, mean * 0.5)
    torch.testing.assert_close(posterior.std, log_variance.exp().sqrt() * 0.5)
    assert torch.equal(codec.decode(posterior.mean), expected)  # 0.5 is a power of two: exact
    assert codec.provenance == {
        "name": "kl-small",
        "sha256": file_sha256(file),
        "scale": "0.5",
        "factor": "8",
    }


def test_weights_are_frozen_fp32(codec: KLCodec) -> None:
    assert {parameter.dtype for parameter in codec.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in codec.parameters())


@pytest.mark.parametrize("scale", ["0", "-1", "inf", "nan", "much"])
def test_an_impossible_scale_is_refused(tmp_path: Path, scale: str) -> None:
    file = tmp_path / "w.safetensors"
    _made_up(file, scale)
    with pytest.raises(CheckpointError, match="expected a positive number"):
        KLCodec(file)


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, file, {"format": "else"})
    with pytest.raises(CheckpointError, match="format 'else', expected 'dsmoe-kl-1'"):
        KLCodec(file)


def test_keys_are_strict(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    _made_up(file)
    tensors = load_file(file)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, file, _notes("1.0"))
    with pytest.raises(CheckpointError, match=f"missing {name}"):
        KLCodec(file)


def test_it_is_cheap(codec: KLCodec, scenes: torch.Tensor) -> None:
    """Seen on one core: 580 encoded and 415 decoded images of 64 px a second; a fifth of that must hold."""
    codec.encode(scenes)
    latents = codec.encode(scenes[:32]).mean
    started = time.process_time()
    codec.encode(scenes)
    encoded = time.process_time()
    codec.decode(latents)
    decoded = time.process_time()
    assert 64 / (encoded - started) > 100
    assert 32 / (decoded - encoded) > 80
