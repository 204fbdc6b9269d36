"""Sheets of images with captions, as PNG files."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dsmoe.base.files import whole_file

MARGIN = 4
CAPTION = 14
SMALLEST_TILE = 96


def grid(images: np.ndarray, captions: list[str], columns: int) -> Image.Image:
    """A sheet of uint8 images [N, H, W, 3], row by row, each with its caption above.

    Small images are enlarged by a whole factor without smoothing, so that their pixels stay visible.
    """
    assert len(images) == len(captions), (len(images), len(captions))
    assert columns >= 1, columns
    side = images.shape[1]
    zoom = max(1, round(SMALLEST_TILE / side))
    tile = side * zoom
    rows = -(-len(images) // columns)
    width = columns * (tile + MARGIN) + MARGIN
    height = rows * (tile + CAPTION + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = MARGIN + (number % columns) * (tile + MARGIN)
        top = MARGIN + (number // columns) * (tile + CAPTION + MARGIN)
        draw.text((left, top), _shorten(draw, font, caption, tile), fill="black", font=font)
        picture = Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST)
        sheet.paste(picture, (left, top + CAPTION))
    return sheet


def _shorten(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, text: str, width: int) -> str:
    while len(text) > 1 and draw.textlength(text, font=font) > width:
        text = text[:-1]
    return text


def save_png(image: Image.Image, path: Path) -> None:
    """Write the picture, whole or not at all."""
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG")
