"""TAESD: key layout with made-up weights everywhere, the real weights where the samples lie."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from shared_data import require

from dsmoe.base.errors import CheckpointError
from dsmoe.codec.quality import reconstruction_psnr
from dsmoe.codec.taesd import DECODER_FILE, ENCODER_FILE, TaesdCodec

# The published layout, written out: index -> (kind, channels out, channels in).
_ENCODER = {0: "3", 2: "s", 6: "s", 10: "s", 14: "4"} | dict.fromkeys((1, 3, 4, 5, 7, 8, 9, 11, 12, 13), "b")
_DECODER = {1: "4", 7: "s", 12: "s", 17: "s", 19: "3"} | dict.fromkeys((3, 4, 5, 8, 9, 10, 13, 14, 15, 18), "b")


def _shapes(layout: dict[int, str], encoder: bool) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for index, kind in layout.items():
        if kind == "b":
            for part in (0, 2, 4):
                shapes[f"{index}.conv.{part}.weight"] = [64, 64, 3, 3]
                shapes[f"{index}.conv.{part}.bias"] = [64]
        elif kind == "s":
            shapes[f"{index}.weight"] = [64, 64, 3, 3]
        else:
            first = index < 2
            shapes[f"{index}.weight"] = [64, int(kind), 3, 3] if first else [int(kind), 64, 3, 3]
            shapes[f"{index}.bias"] = [64] if first else [int(kind)]
    assert len(shapes) == 67, encoder
    return shapes


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A folder of random weights in the published layout, stored in bf16."""
    generator = torch.Generator().manual_seed(5)
    for file, layout in ((ENCODER_FILE, _ENCODER), (DECODER_FILE, _DECODER)):
        shapes = _shapes(layout, file == ENCODER_FILE)
        tensors = {key: 0.05 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        save_file({key: value.to(torch.bfloat16) for key, value in tensors.items()}, tmp_path / file)
    return tmp_path


def _oracle(folder: Path) -> torch.nn.Module:
    """diffusers' AutoencoderTiny with the same weights; its decoder keeps the clamp outside the layer list."""
    tiny = pytest.importorskip("diffusers").AutoencoderTiny()
    state = {f"encoder.layers.{key}": value for key, value in load_file(folder / ENCODER_FILE).items()}
    for key, value in load_file(folder / DECODER_FILE).items():
        index, rest = key.split(".", 1)
        state[f"decoder.layers.{int(index) - 1}.{rest}"] = value
    tiny.load_state_dict({key: value.float() for key, value in state.items()})
    return tiny.eval().requires_grad_(False)


def _photographs(count: int) -> torch.Tensor:
    """The first `count` real photos in path order, centre 256x256 pixels, fp32 [B, 3, 256, 256] in [-1, 1]."""
    files = sorted(require("imagenet_sample", "train").glob("*/*.JPEG"))[:count]
    arrays = []
    for file in files:
        image = Image.open(file).convert("RGB")
        left, top = (image.width - 256) // 2, (image.height - 256) // 2
        arrays.append(np.asarray(image.crop((left, top, left + 256, top + 256))))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_agrees_with_diffusers_on_made_up_weights(made_up: Path) -> None:
    codec, tiny = TaesdCodec(made_up), _oracle(made_up)
    images = torch.rand(2, 3, 32, 40) * 2 - 1
    posterior = codec.encode(images)
    assert not posterior.std.any()
    # the same fp32 convolutions; only the kernels' summation order may differ
    torch.testing.assert_close(posterior.mean, tiny.encode(images).latents, rtol=1e-5, atol=1e-6)
    latents = 4 * torch.randn(2, 4, 4, 5)  # beyond 3: the clamp is seen
    torch.testing.assert_close(codec.decode(latents), tiny.decode(latents).sample, rtol=1e-5, atol=1e-5)


def test_its_numbers(made_up: Path) -> None:
    codec = TaesdCodec(made_up)
    assert (codec.channels, codec.factor, codec.scale) == (4, 8, 1.0)
    assert codec.input_range == (0.0, 1.0)
    data = (made_up / ENCODER_FILE).read_bytes() + (made_up / DECODER_FILE).read_bytes()
    assert codec.provenance["sha256"] == hashlib.sha256(data).hexdigest()
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    assert {parameter.dtype for parameter in codec.parameters()} == {torch.float32}


def test_swapped_files_are_refused_with_their_keys(made_up: Path) -> None:
    encoder, decoder = made_up / ENCODER_FILE, made_up / DECODER_FILE
    data = encoder.read_bytes()
    encoder.write_bytes(decoder.read_bytes())
    decoder.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"taesd_encoder\.safetensors.*missing 0\.weight.*unexpected"):
        TaesdCodec(made_up)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (ENCODER_FILE, lambda t: t.pop("14.bias"), "missing 14.bias"),
        (DECODER_FILE, lambda t: t.update({"0.weight": torch.zeros(1)}), "unexpected 0.weight"),
        (
            DECODER_FILE,
            lambda t: t.update({"1.weight": torch.zeros(64, 16, 3, 3)}),
            "wrong shape 1.weight [64, 16, 3, 3] (expected [64, 4, 3, 3])",
        ),
    ],
)
def test_keys_are_strict(made_up: Path, file: str, change: object, said: str) -> None:
    tensors = load_file(made_up / file)
    change(tensors)
    save_file(tensors, made_up / file)
    with pytest.raises(CheckpointError) as caught:
        TaesdCodec(made_up)
    assert file in str(caught.value)
    assert said in str(caught.value)


def test_real_weights_on_real_photographs() -> None:
    """Seen once: 28.5, 28.4, 29.9 dB on these three (documented elsewhere: 26.7, 26.4, 22.9 on other photos).

    A codec with a wrong range, clamp or channel order falls below 20 dB on all of them. Not every photo reaches 20:
    the sixth in path order, fine texture, gives 16.7.
    """
    folder, images = require("taesd"), _photographs(3)
    codec = TaesdCodec(folder)
    assert reconstruction_psnr(codec, images, batch=2).min() > 26.0
    latents = codec.encode(images).mean
    assert 0.5 < float(latents.std()) < 1.2  # already in Stable Diffusion's scaled space


def test_real_weights_agree_with_diffusers() -> None:
    folder = require("taesd")
    codec, tiny = TaesdCodec(folder), _oracle(folder)
    images = _photographs(1)[..., :128, :128]
    latents = codec.encode(images).mean
    torch.testing.assert_close(latents, tiny.encode(images).latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(codec.decode(latents), tiny.decode(latents).sample, rtol=1e-4, atol=1e-4)
