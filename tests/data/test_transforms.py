import numpy as np
import pytest
import torch
from made_images import pixels
from PIL import Image
from shared_data import require

from dsmoe.data.transforms import centre_crop_adm, hflip, to_float, to_uint8


def _resample(x: np.ndarray, length: int, kernel, support: float) -> np.ndarray:
    """Axis 0 of float [n, ...] to `length` by a windowed kernel in exact arithmetic: the textbook resampler."""
    ratio = len(x) / length
    stretch = max(ratio, 1.0)
    rows = []
    for i in range(length):
        centre = (i + 0.5) * ratio
        low = max(int(centre - support * stretch + 0.5), 0)
        high = min(int(centre + support * stretch + 0.5), len(x))
        weight = np.array([kernel((j + 0.5 - centre) / stretch) for j in range(low, high)])
        rows.append(np.tensordot(weight / weight.sum(), x[low:high], 1))
    return np.stack(rows)


def _cubic(u: float) -> float:
    u, a = abs(u), -0.5
    if u < 1:
        return ((a + 2) * u - (a + 3)) * u * u + 1
    return (((u - 5) * u + 8) * u - 4) * a if u < 2 else 0.0


def _box(u: float) -> float:
    return 1.0 if -0.5 < u <= 0.5 else 0.0


def _resize(x: np.ndarray, width: int, height: int, kernel, support: float) -> np.ndarray:
    across = np.clip(_resample(x.swapaxes(0, 1), width, kernel, support).swapaxes(0, 1), 0, 255)
    return np.clip(_resample(across, height, kernel, support), 0, 255)


def _oracle(image: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """Centre crop in float64 and the number of halvings."""
    x, halvings = image.astype(np.float64), 0
    while min(x.shape[:2]) >= 2 * size:
        x = _resize(x, x.shape[1] // 2, x.shape[0] // 2, _box, 0.5)
        halvings += 1
    scale = size / min(x.shape[:2])
    width, height = round(x.shape[1] * scale), round(x.shape[0] * scale)
    x = _resize(x, width, height, _cubic, 2.0)
    top, left = (height - size) // 2, (width - size) // 2
    return x[top : top + size, left : left + size], halvings


def _check(image: np.ndarray, size: int) -> None:
    got = centre_crop_adm(Image.fromarray(image), size)
    want, halvings = _oracle(image, size)
    assert got.shape == (size, size, 3)
    assert got.dtype == np.uint8
    # Eight-bit rounding after each of two passes: 0.5 of the first, carried by weights of absolute sum <= 1.25
    # (cubic) or 1 (box), plus 0.5 of the second.
    bound = 1.125 + 1.25**2 * halvings + 0.01
    assert np.abs(got - want).max() <= bound


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(40, 40, 40), (41, 64, 24), (50, 47, 24), (48, 95, 24), (97, 101, 24), (200, 130, 16), (7, 9, 24), (1, 1, 8)],
)
def test_crop_matches_the_textbook_resampler(height: int, width: int, size: int) -> None:
    _check(pixels(height * width, height, width), size)


def test_crop_of_real_photos() -> None:
    root = require("imagenet_sample", "train")
    for path in sorted(root.glob("*/*.JPEG"))[::160]:
        _check(np.asarray(Image.open(path).convert("RGB")), 64)


def test_halving_is_an_exact_pair_mean_rounded_after_each_axis() -> None:
    image = pixels(1, 64, 96)
    x = image.astype(np.int64)
    for _ in range(2):
        x = (x[:, 0::2] + x[:, 1::2] + 1) // 2
        x = (x[0::2] + x[1::2] + 1) // 2
    assert np.array_equal(centre_crop_adm(Image.fromarray(image), 16), x[:, 4:20])


def test_halves_only_from_twice_the_size_on() -> None:
    flat = np.zeros((47, 47, 3), np.uint8)
    flat[::2] = 255  # alternating rows: a box filter on 48 would give 128 everywhere
    below = centre_crop_adm(Image.fromarray(flat), 24)
    at = np.zeros((48, 48, 3), np.uint8)
    at[::2] = 255
    assert np.unique(centre_crop_adm(Image.fromarray(at), 24)).tolist() == [128]
    assert len(np.unique(below)) > 2


@pytest.mark.parametrize(("height", "width"), [(24, 37), (37, 24), (24, 24), (24, 25)])
def test_crop_offsets_round_down_and_nothing_else_changes(height: int, width: int) -> None:
    image = pixels(2, height, width)
    top, left = (height - 24) // 2, (width - 24) // 2
    assert np.array_equal(centre_crop_adm(Image.fromarray(image), 24), image[top : top + 24, left : left + 24])


def test_extreme_side_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="side ratio of 70000x1"):
        centre_crop_adm(Image.new("RGB", (70000, 1)), 64)


def test_hflip() -> None:
    image = pixels(3, 4, 5)
    assert np.array_equal(hflip(image), np.stack([image[:, 4 - j] for j in range(5)], axis=1))


def test_bytes_to_floats_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    floats = to_float(every)
    assert floats.dtype == torch.float32
    assert (floats[0], floats[255]) == (-1.0, 1.0)
    # One division and one subtraction, each half a unit of 2^-24 relative to values up to 2.
    assert np.abs(floats.double().numpy() - (np.arange(256) / 127.5 - 1)).max() < 2**-22
    assert torch.equal(to_uint8(floats), every)


def test_to_uint8_truncates_and_clamps() -> None:
    x = torch.tensor([-9.0, -1.0, 0.0, 0.9999 / 127.5, 1.0001 / 127.5, 1.0, 9.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 128, 129, 255, 255]
