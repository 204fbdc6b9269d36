"""What every latent autoencoder offers: `Codec`, `Posterior` and the shape checks all codecs share.

Not here: the autoencoders themselves (one module each) and the choice by name (`build`).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dsmoe.base.errors import ConfigError

IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over scaled latents.

    mean, std: fp32 [B, channels, H/factor, W/factor]; std is zero everywhere for a deterministic encoder.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise; `noise` is standard normal and has the shape of `mean`.

        The caller draws the noise (by global sample index), so that a run does not depend on its layout.
        """
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the posterior {tuple(self.mean.shape)}")
        return self.mean + self.std * noise.to(self.mean)


@runtime_checkable
class Codec(Protocol):
    """An image autoencoder with frozen weights. All maths in fp32; no method records gradients.

    name             the name `codec.build` knows it by
    channels         latent channels
    factor           image side / latent side
    scale            the number raw latents were multiplied by (0.18215 for Stable Diffusion), for the record:
                     what `encode` returns and `decode` takes is already scaled
    input_range      (low, high) of the images the *network* sees; `encode` and `decode` always speak [-1, 1]
    image_multiple   image heights and widths must be multiples of this
    deterministic    the posterior's std is zero for every image
    provenance       name, sha256 of the weights, scale and factor as strings: latents cached under one
                     provenance must not be decoded under another
    """

    name: str
    channels: int
    factor: int
    scale: float
    input_range: tuple[float, float]
    image_multiple: int
    deterministic: bool
    provenance: dict[str, str]

    def encode(self, images: Tensor) -> Posterior:
        """images: float [B, 3, H, W] in [-1, 1] -> Posterior over scaled latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """scaled latents [B, channels, h, w] -> images float32 [B, 3, h*factor, w*factor], not clamped."""
        ...

    def to(self, device: torch.device | str) -> "Codec":
        """Move the weights."""
        ...


def provenance(name: str, sha256: str, scale: float, factor: int) -> dict[str, str]:
    """The record a cache or checkpoint keeps of its codec."""
    return {"name": name, "sha256": sha256, "scale": repr(float(scale)), "factor": str(factor)}


def check_images(codec: Codec, images: Tensor) -> None:
    """Raise ConfigError unless `images` is floating [B, 3, H, W] with sides that the codec can divide."""
    if images.ndim != 4 or images.shape[1] != IMAGE_CHANNELS or not images.is_floating_point():
        raise ConfigError(
            f"codec {codec.name!r} encodes float images [B, 3, H, W] in [-1, 1], got {images.dtype} "
            f"{list(images.shape)}"
        )
    height, width = images.shape[2:]
    if height % codec.image_multiple or width % codec.image_multiple or not (height and width):
        raise ConfigError(
            f"image size {height}x{width} does not suit codec {codec.name!r}: height and width must be "
            f"positive multiples of {codec.image_multiple}; resize or crop the images"
        )


def check_latents(codec: Codec, latents: Tensor) -> None:
    """Raise ConfigError unless `latents` is floating [B, channels, h, w]."""
    if latents.ndim != 4 or latents.shape[1] != codec.channels or not latents.is_floating_point():
        raise ConfigError(
            f"codec {codec.name!r} decodes float latents [B, {codec.channels}, h, w], got {latents.dtype} "
            f"{list(latents.shape)}"
        )
