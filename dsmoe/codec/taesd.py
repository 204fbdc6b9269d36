"""TAESD: the tiny distilled autoencoder that lives in Stable Diffusion's scaled latent space.

Keys are `nn.Sequential` indices (data_formats.md section 3): encoder `0.weight [64,3,3,3]` ...
`14.weight [4,64,3,3]`, decoder `1.weight [64,4,3,3]` ... `19.weight [3,64,3,3]`; index 0 of the decoder has no
parameters.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from dsmoe.base.errors import ConfigError
from dsmoe.codec.files import file_sha256, load_strict, read_safetensors
from dsmoe.codec.protocol import IMAGE_CHANNELS, Posterior, check_images, check_latents, provenance

ENCODER_FILE = "taesd_encoder.safetensors"
DECODER_FILE = "taesd_decoder.safetensors"
_WIDTH = 64
_LATENT_CHANNELS = 4


class _SoftClamp(nn.Module):
    """tanh(x/3)*3: keeps stray latents inside the range the decoder was trained on."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _Block(nn.Module):
    """conv-relu-conv-relu-conv plus the identity, then relu; parameters `conv.{0,2,4}`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def _conv(channels_in: int = _WIDTH, channels_out: int = _WIDTH, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=bias)


def _encoder() -> nn.Sequential:
    layers: list[nn.Module] = [_conv(IMAGE_CHANNELS), _Block()]
    for _ in range(3):
        layers += [_conv(stride=2, bias=False), _Block(), _Block(), _Block()]
    return nn.Sequential(*layers, _conv(channels_out=_LATENT_CHANNELS))


def _decoder() -> nn.Sequential:
    layers: list[nn.Module] = [_SoftClamp(), _conv(_LATENT_CHANNELS), nn.ReLU()]
    for _ in range(3):
        layers += [_Block(), _Block(), _Block(), nn.Upsample(scale_factor=2), _conv(bias=False)]
    return nn.Sequential(*layers, _Block(), _conv(channels_out=IMAGE_CHANNELS))


class TaesdCodec(nn.Module):
    """TAESD from a folder with `taesd_encoder.safetensors` and `taesd_decoder.safetensors`.

    The network sees images in [0, 1]; its latents are already scaled (scale 1) and deterministic (std 0).
    Weights stored in bf16 are computed with in fp32. `provenance["sha256"]` is that of both files' bytes, encoder
    first.
    """

    name = "taesd"
    channels = _LATENT_CHANNELS
    factor = 8
    scale = 1.0
    input_range = (0.0, 1.0)
    image_multiple = 8
    deterministic = True

    def __init__(self, path: Path | str | None) -> None:
        super().__init__()
        folder = _folder(path)
        self.encoder = _encoder()
        self.decoder = _decoder()
        for module, file in ((self.encoder, ENCODER_FILE), (self.decoder, DECODER_FILE)):
            tensors, _ = read_safetensors(folder / file)
            load_strict(module, tensors, str(folder / file))
        sha256 = file_sha256(folder / ENCODER_FILE, folder / DECODER_FILE)
        self.provenance = provenance(self.name, sha256, self.scale, self.factor)
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Posterior:
        """images [B, 3, H, W] in [-1, 1] -> scaled latents [B, 4, H/8, W/8], std 0."""
        check_images(self, images)
        mean = self.encoder(images.to(torch.float32).add(1).div(2)).contiguous()
        return Posterior(mean, torch.zeros_like(mean))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """scaled latents [B, 4, h, w] -> images [B, 3, 8h, 8w], not clamped."""
        check_latents(self, latents)
        return self.decoder(latents.to(torch.float32)).mul(2).sub(1).contiguous()


def _folder(path: Path | str | None) -> Path:
    if path is None:
        raise ConfigError(f"codec 'taesd' needs codec.path, a folder with {ENCODER_FILE} and {DECODER_FILE}")
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"codec path {str(path)!r} is no folder; 'taesd' needs one with {ENCODER_FILE} and {DECODER_FILE}"
        )
    return folder
