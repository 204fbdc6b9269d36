"""Small image folders made on the spot, with every kind of file that real folders hold."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Random uint8 [height, width, channels]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int, height: int = 24, width: int = 24) -> bytes:
    """A lossless photo stand-in: decodes to exactly `pixels(seed, height, width)`."""
    return encoded(Image.fromarray(pixels(seed, height, width)), "PNG")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one byte of data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def folder(root: Path, files: dict[str, bytes]) -> Path:
    """Write {"class/file": content} under root."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def good_and_bad(root: Path, total: int, bad: set[int], classes: int = 3) -> Path:
    """`total` 8x8 PNGs over the classes in item order, those in `bad` replaced by text."""
    per_class = -(-total // classes)
    return folder(
        root,
        {f"c{i // per_class}/{i:04d}.png": b"no image" if i in bad else png(i, 8, 8) for i in range(total)},
    )
