"""The codec "none": diffusion in pixel space. Latents are the images themselves."""

from pathlib import Path

import torch
from torch import Tensor

from dsmoe.base.errors import ConfigError
from dsmoe.codec.protocol import IMAGE_CHANNELS, Posterior, check_images, check_latents, provenance


class IdentityCodec:
    """Channels 3, factor 1, scale 1, posterior std 0. It has no weights, so `to` has nothing to move."""

    name = "none"
    channels = IMAGE_CHANNELS
    factor = 1
    scale = 1.0
    input_range = (-1.0, 1.0)
    image_multiple = 1
    deterministic = True

    def __init__(self, path: Path | str | None = None) -> None:
        if path is not None:
            raise ConfigError(f"codec 'none' has no weights, but codec.path is {str(path)!r}; remove it")
        self.provenance = provenance(self.name, "none", self.scale, self.factor)

    def to(self, device: torch.device | str) -> "IdentityCodec":
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Posterior:
        """images [B, 3, H, W] in [-1, 1] -> the same values in fp32, std 0."""
        check_images(self, images)
        mean = images.detach().to(torch.float32)
        return Posterior(mean, torch.zeros_like(mean))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, 3, H, W] -> the same values in fp32, not clamped."""
        check_latents(self, latents)
        return latents.detach().to(torch.float32)
