"""How well a codec gives back an image: PSNR. No data and no perceptual metrics here."""

import torch
from torch import Tensor

from dsmoe.codec.protocol import Codec


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, fp32 [B]: 10 log10(peak^2 / mean squared error).

    Both [B, 3, H, W] in [-1, 1], so peak is 2; reconstructions are clamped to it, not rounded to bytes.
    """
    difference = images.to(torch.float32) - reconstructions.to(torch.float32).clamp(-1, 1)
    error = difference.square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4.0 / error.clamp_min(1e-12))


@torch.no_grad()
def reconstruction_psnr(codec: Codec, images: Tensor, batch: int = 64) -> Tensor:
    """PSNR of decode(encode(x).mean) for each image, fp32 [B]; `batch` bounds the memory."""
    parts = [psnr(part, codec.decode(codec.encode(part).mean)) for part in images.split(batch)]
    return torch.cat(parts)
