"""Deterministic image transforms: centre crop, flip, bytes to [-1, 1] and back. Not here: anything drawn."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Four bytes a pixel inside PIL: 256 MiB. At 256 pixels this is a side ratio of 1024.
MAX_RESIZED_PIXELS = 1 << 26


def centre_crop_adm(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop (contracts 2.1.11): RGB image of any size -> uint8 [size, size, 3].

    Halves both sides (floor) with a box filter while the short side is at least 2*size, resizes the short
    side to `size` bicubically (up or down), cuts out the centre with offsets rounded down. ValueError when
    the side ratio is so large that the resized image would exceed MAX_RESIZED_PIXELS.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_RESIZED_PIXELS:
        raise ValueError(f"side ratio of {image.width}x{image.height} is too large to crop to {size} pixels")
    pixels = np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size].copy()


def hflip(image: np.ndarray) -> np.ndarray:
    """[H, W, C] mirrored left-right (a view)."""
    return image[:, ::-1]


def to_float(images: Tensor) -> Tensor:
    """uint8 in any layout -> float32 in [-1, 1], same layout: x / 127.5 - 1."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Floats where [-1, 1] is black to white -> uint8, same layout: clamp(127.5 x + 128, 0, 255), truncated.

    Exact inverse of `to_float` (contracts 2.1.11).
    """
    return (images.to(torch.float32) * 127.5 + 128.0).clamp(0, 255).to(torch.uint8)
