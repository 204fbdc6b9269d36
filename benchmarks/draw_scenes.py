"""Contact sheet of the embedded scenes: `python benchmarks/draw_scenes.py --out scenes.png`."""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from dsmoe.data.scenes import Scenes  # noqa: E402


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    return image.repeat(factor, 0).repeat(factor, 1)


def depth_picture(depth: np.ndarray) -> np.ndarray:
    near = 1.0 / depth
    grey = (near - near.min()) / (near.max() - near.min())
    return (grey[..., None].repeat(3, -1) * 255).astype(np.uint8)


def flow_picture(flow: np.ndarray) -> np.ndarray:
    """Direction as hue, length as saturation (the longest vector is full)."""
    length = np.hypot(flow[..., 0], flow[..., 1])
    hue = (np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi)) % 1.0
    hsv = np.stack([hue, length / length.max(), np.ones_like(hue)], -1)
    return np.asarray(Image.fromarray((hsv * 255).astype(np.uint8), "HSV").convert("RGB"))


def mask_picture(mask: np.ndarray) -> np.ndarray:
    return mask[..., None].repeat(3, -1).astype(np.uint8) * 255


def class_rows(data: Scenes, columns: int, factor: int) -> list[np.ndarray]:
    rows: list[list[np.ndarray]] = [[] for _ in range(data.num_classes)]
    for i in range(len(data)):
        row = rows[data.label(i)]
        if len(row) < columns:
            row.append(enlarge(data.read(i)[0], factor))
    return [np.concatenate(row, 1) for row in rows]


def label_rows(data: Scenes, factor: int, count: int) -> list[np.ndarray]:
    """Scenes with an occluder: frames 1 and 2, depth, flow, amodal and visible mask."""
    rows = []
    for i in range(len(data)):
        full = data.read_full(i)
        if (full.amodal & ~full.visible).sum() < 0.15 * full.amodal.sum():
            continue
        pictures = [full.image, full.image2, depth_picture(full.depth), flow_picture(full.flow)]
        pictures += [mask_picture(full.amodal), mask_picture(full.visible)]
        rows.append(np.concatenate([enlarge(p, factor) for p in pictures], 1))
        if len(rows) == count:
            break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--split", default="train")
    arguments = parser.parse_args()
    factor = max(1, 128 // arguments.resolution)
    data = Scenes(arguments.split, arguments.resolution, 16 * 6)
    left = class_rows(data, 6, factor)
    half = len(left) // 2
    sheet = np.concatenate([np.concatenate(left[:half], 0), np.concatenate(left[half:], 0)], 1)
    cell = factor * arguments.resolution
    bottom = np.concatenate(label_rows(Scenes(arguments.split, arguments.resolution), factor, 4), 0)
    bottom = np.concatenate([bottom[: 2 * cell], bottom[2 * cell :]], 1)
    picture = Image.fromarray(np.concatenate([sheet, bottom], 0))
    pen = ImageDraw.Draw(picture)
    for k, name in enumerate(data.class_names):
        place = (4 + (k // half) * 6 * cell, 4 + (k % half) * cell)
        pen.text(place, name, fill="white", stroke_width=1, stroke_fill="black")
    for k, name in enumerate(("frame 1", "frame 2", "depth", "flow", "amodal", "visible") * 2):
        pen.text((4 + k * cell, 4 + half * cell), name, fill="white", stroke_width=1, stroke_fill="black")
    picture.save(arguments.out)


if __name__ == "__main__":
    main()
