import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from made_images import encoded, folder, good_and_bad, pixels, png, png_header
from PIL import Image, ImageFile
from shared_data import require

from dsmoe.base.errors import ConfigError, DataError
from dsmoe.data import build_dataset, image_folder
from dsmoe.data.dataset import FaultReporter
from dsmoe.data.encoded_images import MIN_BAD
from dsmoe.data.image_folder import ImageFolder


def _read(root: Path, content: bytes, name: str = "x.jpg", resolution: int = 24) -> np.ndarray:
    dataset = ImageFolder(folder(root, {f"a/{name}": content}), resolution)
    image, label = dataset.read(0)
    assert label == 0
    assert image.shape == (resolution, resolution, 3)
    assert image.dtype == np.uint8
    return image


def _reason(root: Path, content: bytes, resolution: int = 24) -> str:
    """Why a file counts as damaged; its neighbour must have stood in."""
    dataset = ImageFolder(folder(root, {"a/1.jpg": content, "b/2.png": png(2)}), resolution)
    image, label = dataset.read(0)
    assert label == 1
    assert resolution != 24 or np.array_equal(image, pixels(2, 24, 24))
    (fault,) = dataset.drain_faults()
    assert (fault.item, fault.name) == (0, "a/1.jpg")
    assert dataset.drain_faults() == ()
    return fault.reason


def test_classes_and_items_are_sorted(tmp_path: Path) -> None:
    names = ["b/2.JPEG", "b/10.jpg", "a/x.PNG", "a/w.webp", "a/v.BmP", "C/1.jpeg"]
    root = folder(tmp_path, {name: png(i) for i, name in enumerate(names)})
    dataset = ImageFolder(root, 24)
    assert dataset.class_names == ("C", "a", "b")
    assert dataset.num_classes == 3
    found = [dataset.name(i) for i in range(len(dataset))]
    assert found == ["C/1.jpeg", "a/v.BmP", "a/w.webp", "a/x.PNG", "b/10.jpg", "b/2.JPEG"]
    for i, name in enumerate(found):
        image, label = dataset.read(i)
        assert np.array_equal(image, pixels(names.index(name), 24, 24))
        assert label == dataset.class_names.index(name[0])


def test_hidden_nested_and_other_files_are_ignored(tmp_path: Path) -> None:
    names = ["a/1.png", "a/.2.png", "a/deep/3.png", "a/notes.txt", ".b/1.png", "a/4.png.tmp"]
    root = folder(tmp_path, {name: png(1) for name in names})
    (root / "a" / "folder.jpg").mkdir()
    (root / "a" / "dangling.jpg").symlink_to("nowhere.jpg")
    (root / "top.png").write_bytes(png(2))
    dataset = ImageFolder(root, 24)
    assert [dataset.name(i) for i in range(len(dataset))] == ["a/1.png"]


def test_names_beyond_ascii_and_links_between_folders(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"\u00e9t\u00e9/\u00fcber 1.png": png(1)})
    (root / "linked").symlink_to(folder(tmp_path / "far", {"z/1.png": png(2)}) / "z")
    dataset = ImageFolder(root, 24)
    assert dataset.class_names == ("linked", "\u00e9t\u00e9")
    assert np.array_equal(dataset.read(1)[0], pixels(1, 24, 24))


def test_png_named_jpeg(tmp_path: Path) -> None:
    assert np.array_equal(_read(tmp_path, png(5), "x.JPEG"), pixels(5, 24, 24))


def test_cmyk_jpeg(tmp_path: Path) -> None:
    image = _read(tmp_path, encoded(Image.new("CMYK", (24, 24), (0, 255, 255, 0)), "JPEG"))
    # Full magenta and yellow is red; JPEG may shift a flat colour by a level or two.
    assert np.abs(image.astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_dropped_not_composited(tmp_path: Path, kind: str) -> None:
    rgba = np.dstack([pixels(1, 24, 24), np.full((24, 24), 128, np.uint8)])
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image = _read(tmp_path, encoded(Image.fromarray(rgba), kind, **options))
    assert np.array_equal(image, rgba[..., :3])


def test_greyscale_of_8_and_16_bits(tmp_path: Path) -> None:
    grey = pixels(1, 24, 24, 1)[..., 0]
    image = _read(tmp_path / "8", encoded(Image.fromarray(grey), "PNG"))
    assert np.array_equal(image, np.dstack([grey] * 3))
    deep = grey.astype(np.uint16) * 256 + 77
    image = _read(tmp_path / "16", encoded(Image.fromarray(deep), "PNG"))
    assert np.array_equal(image, np.dstack([grey] * 3))


def test_palette_with_transparency_is_silent(tmp_path: Path) -> None:
    paletted = Image.fromarray(pixels(1, 24, 24)).quantize(16)
    content = encoded(paletted, "PNG", transparency=bytes(range(16)))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        image = _read(tmp_path, content)
    assert shown == []
    assert np.array_equal(image, np.asarray(paletted.convert("RGB")))
    (tmp_path / "y.png").write_bytes(content)
    with pytest.warns(UserWarning, match="Transparency"):  # what would have been printed
        Image.open(tmp_path / "y.png").convert("RGB")


@pytest.mark.parametrize("kind", ["BMP", "GIF", "MPO"])
def test_other_formats_by_content(tmp_path: Path, kind: str) -> None:
    image = Image.new("RGB", (24, 24), (10, 100, 250))
    options = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
    got = _read(tmp_path, encoded(image, kind, **options))
    assert np.abs(got.astype(int) - [10, 100, 250]).max() <= (2 if kind == "MPO" else 0)


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(1, 24, 24))
    exif = Image.Exif()
    exif[274] = 6
    turned = _read(tmp_path / "exif", encoded(image, "JPEG", exif=exif))
    assert np.array_equal(turned, _read(tmp_path / "plain", encoded(image, "JPEG")))


def test_one_pixel_and_long_strips(tmp_path: Path) -> None:
    one = _read(tmp_path / "1", encoded(Image.new("RGB", (1, 1), (9, 80, 200)), "PNG"))
    assert np.unique(one.reshape(-1, 3), axis=0).tolist() == [[9, 80, 200]]
    _read(tmp_path / "wide", encoded(Image.new("RGB", (4000, 1)), "PNG"))
    _read(tmp_path / "high", encoded(Image.new("RGB", (3, 4000)), "PNG"))


def test_damaged_files_and_their_reasons(tmp_path: Path) -> None:
    jpeg = encoded(Image.fromarray(pixels(1, 64, 64)), "JPEG")
    assert _reason(tmp_path / "empty", b"") == "empty file"
    assert _reason(tmp_path / "text", b"<html>404</html>") == "not an image"
    assert _reason(tmp_path / "cut", jpeg[: len(jpeg) // 2]).startswith("image file is truncated")
    assert _reason(tmp_path / "head", jpeg[:20])
    assert "decompression bomb" in _reason(tmp_path / "bomb", png_header(40000, 40000))
    assert "decompression bomb" in _reason(tmp_path / "warned", png_header(10000, 10000))
    assert "side ratio" in _reason(tmp_path / "strip", encoded(Image.new("RGB", (70000, 1)), "PNG"), 64)
    flipped = bytearray(png(3))
    flipped[60] ^= 0xFF
    assert _reason(tmp_path / "bits", bytes(flipped))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_the_next_readable_image_stands_in_and_the_last_wraps(tmp_path: Path) -> None:
    dataset = ImageFolder(good_and_bad(tmp_path, 9, {3, 4, 5, 8}), 8)
    for asked, given in {3: 6, 4: 6, 5: 6, 6: 6, 8: 0, 2: 2}.items():
        image, label = dataset.read(asked)
        assert np.array_equal(image, pixels(given, 8, 8))
        assert label == given // 3
    assert [fault.item for fault in dataset.drain_faults()] == [3, 4, 5, 8]


def test_stand_ins_do_not_depend_on_what_was_read_before(tmp_path: Path) -> None:
    root = good_and_bad(tmp_path, 30, {0, 7, 8, 9, 20, 29})
    forward, backward = ImageFolder(root, 8), ImageFolder(root, 8)
    expected = [forward.read(i) for i in range(30)]
    for i in reversed(range(30)):
        image, label = backward.read(i)
        assert np.array_equal(image, expected[i][0])
        assert label == expected[i][1]


def test_a_folder_without_any_readable_image(tmp_path: Path) -> None:
    dataset = ImageFolder(good_and_bad(tmp_path, 5, set(range(5))), 8)
    with pytest.raises(DataError, match=r"none of 5 consecutive items .* is a readable image \(the first: not an"):
        dataset.read(2)


def _drive(dataset: ImageFolder, items: range, batch: int = 10) -> None:
    for start in range(items.start, items.stop, batch):
        for i in range(start, start + batch):
            dataset.read(i)
        dataset.account(batch, dataset.drain_faults())


def test_too_many_damaged_files_stop_with_numbers_and_names(tmp_path: Path) -> None:
    bad = set(range(0, 400, 20))  # 5 %
    root = good_and_bad(tmp_path, 400, bad)
    with pytest.raises(DataError) as caught:
        _drive(ImageFolder(root, 8, max_bad_fraction=0.04), range(400))
    line = str(caught.value)
    # The 10th damaged file, the first that is judged, is item 180, in the batch that ends at 190.
    assert f"{MIN_BAD} of 190 images read" in line
    assert "(5.26 %, data.max_bad_fraction allows 4 %)" in line
    assert [int(n) for n in re.findall(r"c\d/(\d+)\.png \(not an image\)", line)] == [0, 20, 40, 60, 80]
    assert "raise data.max_bad_fraction" in line
    assert "\n" not in line
    tolerant = ImageFolder(root, 8, max_bad_fraction=0.06)
    _drive(tolerant, range(400))
    assert {fault.item for fault in tolerant.faults} == bad


def test_the_share_is_of_distinct_items(tmp_path: Path) -> None:
    root = good_and_bad(tmp_path, 400, set(range(0, 400, 20)))
    dataset = ImageFolder(root, 8, max_bad_fraction=0.06)
    for _ in range(3):
        _drive(dataset, range(400))
    assert len(dataset.faults) == 20


def test_few_damaged_files_are_too_few_to_judge_unless_none_is_allowed(tmp_path: Path) -> None:
    root = good_and_bad(tmp_path, 30, {0, 1, 2})
    _drive(ImageFolder(root, 8, max_bad_fraction=0.01), range(30))
    with pytest.raises(DataError, match="3 of 10 images"):
        _drive(ImageFolder(root, 8, max_bad_fraction=0.0), range(30))
    _drive(ImageFolder(root, 8, max_bad_fraction=1.0), range(30))
    tiny = good_and_bad(tmp_path / "tiny", 5, {0, 1, 2})
    with pytest.raises(DataError, match="3 of 5 images"):
        _drive(ImageFolder(tiny, 8), range(5), batch=5)


def test_a_vanished_file_stops_the_run(tmp_path: Path) -> None:
    dataset = ImageFolder(good_and_bad(tmp_path, 6, set()), 8)
    (tmp_path / "c0" / "0001.png").unlink()
    with pytest.raises(DataError, match=r"cannot read .*0001.png.*: No such file"):
        dataset.read(1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no class folders and no images; give a folder that holds one sub-folder"),
        (["1.png", "2.png"], "is flat: 2 images and no class folders"),
        (["a/1.png", "b/1.txt", "c/.1.png"], r"2 of 3 class folders .* hold no images .*: 'b', 'c'; fill or"),
        (["train/a/1.png", "val/a/1.png"], r"holds splits \(train, val\), not classes; .* data.path=.*/train\."),
        (["train/1.png", "val/1.png", "meta/1.txt"], "holds splits"),
    ],
)
def test_unusable_folders(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        ImageFolder(folder(tmp_path, dict.fromkeys(files, png(1))), 24)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_file_instead(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; give"):
        ImageFolder(tmp_path / "none", 24)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="is not a folder; give"):
        ImageFolder(tmp_path / "file", 24)


def test_pickles_small(tmp_path: Path) -> None:
    dataset = ImageFolder(good_and_bad(tmp_path, 300, {4}), 8)
    assert isinstance(dataset, FaultReporter)
    content = pickle.dumps(dataset)
    assert len(content) < 300 * (8 + 4 + 8) + 2000  # name, label, offset a file
    assert np.array_equal(pickle.loads(content).read(4)[0], dataset.read(4)[0])


def test_a_large_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "KEPT_FROM", 20)
    root = good_and_bad(tmp_path / "data", 60, {4}, classes=6)
    listed, scandir = [], image_folder.os.scandir
    monkeypatch.setattr(
        image_folder.os, "scandir", lambda path: listed.append(str(path).split("/")[-1]) or scandir(path)
    )
    first = ImageFolder(root, 8)
    assert [name for name in listed if name.startswith("c")].count("c5") == 1
    listed.clear()
    again = ImageFolder(root, 8, index_folder=None)
    assert "c5" not in listed  # only as many as it takes to see that the folder is large
    names = [first.name(i) for i in range(60)]
    assert [again.name(i) for i in range(60)] == names
    assert names[59] == "c5/0059.png"
    assert first.fingerprint == again.fingerprint
    assert again.read(59)[1] == 5
    folder(root, {"c5/0060.png": png(60, 8, 8)})  # the folder's time of change tells
    assert len(ImageFolder(root, 8)) == 61
    monkeypatch.setattr(image_folder, "KEPT_FROM", 1000)
    assert len(ImageFolder(root, 8)) == 61


def test_real_photos() -> None:
    dataset = ImageFolder(require("imagenet_sample", "train"), 32)
    assert (len(dataset), dataset.num_classes) == (800, 800)
    assert dataset.class_names[:3] == ("n01440764", "n01443537", "n01484850")
    for i in range(0, 800, 40):
        image, label = dataset.read(i)
        assert label == i
        assert image.std() > 5
    assert dataset.drain_faults() == ()


def test_real_photo_cut_short(tmp_path: Path) -> None:
    photo = next(require("imagenet_sample", "train").glob("n01440764/*")).read_bytes()
    assert _reason(tmp_path, photo[: len(photo) * 2 // 3]).startswith("image file is truncated")


def test_build_dataset(tmp_path: Path) -> None:
    root = good_and_bad(tmp_path, 6, set())
    dataset = build_dataset("image_folder", path=str(root), resolution=8, max_bad_fraction=0.5)
    assert (len(dataset), dataset.resolution, dataset.max_bad_fraction) == (6, 8, 0.5)
    with pytest.raises(ConfigError, match=r"unknown data.source 'imagefolder'. Did you mean 'image_folder'\?"):
        build_dataset("imagefolder", path=root, resolution=8)
    with pytest.raises(ConfigError, match=r"data.path is missing"):
        build_dataset("image_folder", resolution=8)
    with pytest.raises(ConfigError, match=r"data\.size is 5"):
        build_dataset("image_folder", path=root, resolution=8, size=5)
    with pytest.raises(ConfigError, match="split 'test' asked of"):
        build_dataset("image_folder", path=root, resolution=8, split="test")


def test_build_scenes() -> None:
    dataset = build_dataset("scenes", resolution=32, size=5, split="test")
    assert len(dataset) == 5
    image, label = dataset.read(0)
    assert image.shape == (32, 32, 3)
    assert 0 <= label < dataset.num_classes
