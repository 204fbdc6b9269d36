"""Our own small KL autoencoder, "kl-small": factor 8, 4 channels, cheap on a CPU.

The network (`KLAutoencoder`, with gradients, used by `codec.fit`) and the frozen codec around it (`KLCodec`).
Not here: training (`codec.fit`). The posterior and its scaling follow Rombach et al. 2022 (section 3.1 and
appendix G): a weakly regularised Gaussian, latents divided by their measured standard deviation.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe.base.errors import CheckpointError, ConfigError
from dsmoe.codec.files import file_sha256, load_strict, read_safetensors
from dsmoe.codec.protocol import IMAGE_CHANNELS, Posterior, check_images, check_latents, provenance

WEIGHTS = Path(__file__).parent / "weights" / "kl_small.safetensors"
FORMAT = "dsmoe-kl-1"
CHANNELS = 4
FACTOR = 8
_STEM = 2  # pixel (un)shuffle at the image end: no layer runs at full resolution
_WIDTHS = (48, 96, 128)  # at 1/2, 1/4 and 1/8 of the image side
_GROUP = 16  # channels in a GroupNorm group
_LOG_VARIANCE = (-20.0, 10.0)


def _conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1)


class _Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(width // _GROUP, width)
        self.conv1 = _conv(width, width)
        self.norm2 = nn.GroupNorm(width // _GROUP, width)
        self.conv2 = _conv(width, width)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def _head(width: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(width // _GROUP, width), nn.SiLU(), _conv(width, channels))


class KLAutoencoder(nn.Module):
    """Fully convolutional encoder and decoder with gradients, in raw (unscaled) latent units."""

    def __init__(self) -> None:
        super().__init__()
        low, middle, high = _WIDTHS
        pixels = IMAGE_CHANNELS * _STEM**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(_STEM),
            _conv(pixels, low),
            _conv(low, middle, stride=2),
            _Residual(middle),
            _conv(middle, high, stride=2),
            _Residual(high),
            _Residual(high),
            _head(high, 2 * CHANNELS),
        )
        self.decoder = nn.Sequential(
            _conv(CHANNELS, high),
            _Residual(high),
            _Residual(high),
            nn.Conv2d(high, middle, 1),  # before the upsampling: a quarter of the work
            nn.Upsample(scale_factor=2),
            _Residual(middle),
            nn.Conv2d(middle, low, 1),
            nn.Upsample(scale_factor=2),
            _Residual(low),
            _head(low, pixels),
            nn.PixelShuffle(_STEM),
        )
        self.to(memory_format=torch.channels_last)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] in [-1, 1] -> (mean, log variance) fp32 [B, 4, H/8, W/8]."""
        mean, log_variance = self.encoder(images).to(torch.float32).chunk(2, dim=1)
        return mean, log_variance.clamp(*_LOG_VARIANCE)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """raw latents [B, 4, h, w] -> images fp32 [B, 3, 8h, 8w], not clamped."""
        return self.decoder(latents).to(torch.float32)


class KLCodec(nn.Module):
    """The committed autoencoder, or another file that `launchers/train_codec.py` wrote.

    `scale` is 1 / standard deviation of the raw latents over training images, read from the file's metadata.
    """

    name = "kl-small"
    channels = CHANNELS
    factor = FACTOR
    input_range = (-1.0, 1.0)
    image_multiple = FACTOR
    deterministic = False

    def __init__(self, path: Path | str | None = None) -> None:
        super().__init__()
        file = WEIGHTS if path is None else Path(path)
        if not file.is_file():
            raise ConfigError(
                f"codec path {str(file)!r} is not a file; 'kl-small' takes a safetensors file made by "
                "launchers/train_codec.py, or no path for the weights that ship with dsmoe"
            )
        tensors, metadata = read_safetensors(file)
        self.scale = _scale(metadata, file)
        self.network = KLAutoencoder()
        load_strict(self.network, tensors, str(file))
        self.provenance = provenance(self.name, file_sha256(file), self.scale, self.factor)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Posterior:
        """images [B, 3, H, W] in [-1, 1] -> Posterior over scaled latents [B, 4, H/8, W/8]."""
        check_images(self, images)
        mean, log_variance = self.network.moments(images.to(torch.float32))
        std = torch.exp(0.5 * log_variance)
        return Posterior((mean * self.scale).contiguous(), (std * self.scale).contiguous())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """scaled latents [B, 4, h, w] -> images [B, 3, 8h, 8w], not clamped."""
        check_latents(self, latents)
        return self.network.reconstruct(latents.to(torch.float32) / self.scale).contiguous()


def _scale(metadata: dict[str, str], file: Path) -> float:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} says format {metadata.get('format')!r}, expected {FORMAT!r}; make the file with "
            "launchers/train_codec.py"
        )
    try:
        scale = float(metadata["scale"])
    except (KeyError, ValueError):
        scale = 0.0
    if not 0.0 < scale < float("inf"):
        raise CheckpointError(f"{file} has scale {metadata.get('scale')!r}, expected a positive number")
    return scale
