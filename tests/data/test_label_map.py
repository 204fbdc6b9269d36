"""Label texts to class numbers and names: ImageNet's lists in the forms in which people have them."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_images import folder, pixels, png
from made_shards import samples, tar

from dsmoe.base.errors import DataError
from dsmoe.data.image_folder import ImageFolder
from dsmoe.data.label_map import classes_of, read_file_map
from dsmoe.data.webdataset import WebDataset

SYNSETS = "n02 tench, Tinca tinca\nn01 crane\n\nn03\nn04 crane, bird\n"


def mapped(root: Path, content: object, labels: list[str]) -> tuple[list[int], tuple[str, ...]]:
    file = root / "map"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    classes = classes_of(labels, "DATA", str(file))
    return classes.numbers.tolist(), classes.names


def test_without_a_map_words_are_sorted_and_numbers_taken() -> None:
    words = classes_of(["n01", "n02"], "DATA")
    assert (words.numbers.tolist(), words.names) == ([0, 1], ("n01", "n02"))
    numbers = classes_of(["10", "2", "3"], "DATA")  # sorted as text, as an index has them
    assert numbers.numbers.tolist() == [10, 2, 3]
    assert numbers.names == tuple(str(n) for n in range(11))
    assert numbers.numbers.dtype == np.int32


def test_a_text_map_orders_and_names(tmp_path: Path) -> None:
    names = ("tench", "crane n01", "n03", "crane n04")  # the first synonym; what is not distinct gets its class
    assert mapped(tmp_path, SYNSETS, ["n01", "n02", "n04"]) == ([1, 0, 3], names)
    assert mapped(tmp_path, SYNSETS, ["0", "3"]) == ([0, 3], names)  # tars with numbers, names from the list


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"n02": 0, "n01": 1}, ("n02", "n01")),
        ({"0": ["n02", "tench"], "1": ["n01", "crane"]}, ("tench", "crane")),
    ],
)
def test_json_maps(tmp_path: Path, content: dict, names: tuple[str, ...]) -> None:
    assert mapped(tmp_path, content, ["n01", "n02"]) == ([1, 0], names)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n01\nn03\n", r"has 2 classes and lacks 1 of the labels in 'DATA': 'n02'; a label map is text"),
        ("n01 a\nn01 b\n", "lists 'n01' more than once"),
        ("", "lists no classes"),
        ("[1, 2]", "lists no classes"),
        ({"n01": 0, "n02": 2}, "does not number its 2 classes from 0 to 1, each once"),
        ({"n01": 0, "n02": "x"}, "does not number its 2 classes"),
        ({"n01": 0, "n02": True}, "does not number its 2 classes"),
        ({"0": ["n01", "a"], "2": ["n02", "b"]}, "lacks number 1"),
        ("{broken", "is neither text nor JSON"),
    ],
)
def test_maps_that_do_not_fit(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        mapped(tmp_path, content, ["n01", "n02"])
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"cannot read label map .*: No such file"):
        classes_of(["a"], "DATA", str(tmp_path / "none"))


def test_numbers_beyond_the_map(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 4 classes and lacks 1 of the labels in 'DATA': '4'"):
        mapped(tmp_path, SYNSETS, ["0", "4"])


def test_a_folder_takes_a_map(tmp_path: Path) -> None:
    (tmp_path / "map").write_text(SYNSETS)
    root = folder(tmp_path / "data", {"n01/a.png": png(1), "n04/b.png": png(2)})
    dataset = ImageFolder(root, 24, label_map=str(tmp_path / "map"))
    assert dataset.num_classes == 4
    assert [dataset.read(i)[1] for i in range(2)] == [1, 3]
    assert dataset.fingerprint != ImageFolder(root, 24).fingerprint  # other labels, other data


def test_tars_take_a_map(tmp_path: Path) -> None:
    (tmp_path / "map").write_text(SYNSETS)
    tar(tmp_path / "words" / "t.tar", samples([("a", png(0), "n04"), ("b", png(1), "n02")]))
    tar(tmp_path / "numbers" / "t.tar", samples([("a", png(0), 3), ("b", png(1), 0)]))
    for form in ("words", "numbers"):
        dataset = WebDataset(tmp_path / form, 24, label_map=str(tmp_path / "map"))
        assert [dataset.read(i)[1] for i in range(2)] == [3, 0]
        assert dataset.class_names[0] == "tench"


FLAT = {"val_1.JPEG": "n02", "val_2.JPEG": "n01", "val_3.JPEG": "n02"}


@pytest.mark.parametrize(
    "content",
    [
        "".join(f"{file} {label}\n" for file, label in FLAT.items()),
        "ImageId,PredictionString\nval_3,n02 1 2 3 4\nval_1,n02 5 6 7 8 n02 1 1 2 2\nval_2,n01 9 9 9 9\n",  # Kaggle's
        json.dumps(FLAT),
    ],
)
def test_the_flat_validation_folder(tmp_path: Path, content: str) -> None:
    root = folder(tmp_path / "val", {name: png(i, 8, 8) for i, name in enumerate(FLAT)})
    (tmp_path / "map").write_text(content)
    dataset = ImageFolder(root, 8, label_map=str(tmp_path / "map"))
    assert dataset.class_names == ("n01", "n02")
    assert [dataset.name(i) for i in range(3)] == list(FLAT)
    for i, label in enumerate(FLAT.values()):
        image, number = dataset.read(i)
        assert np.array_equal(image, pixels(i, 8, 8))
        assert dataset.class_names[number] == label


def test_a_flat_folder_with_files_that_the_map_lacks(tmp_path: Path) -> None:
    root = folder(tmp_path / "val", {name: png(i, 8, 8) for i, name in enumerate(FLAT)})
    (tmp_path / "map").write_text("val_2.JPEG n01\n")
    with pytest.raises(DataError, match=r"names no class for 2 of its 3 images: 'val_1.JPEG', 'val_3.JPEG'; it needs"):
        ImageFolder(root, 8, label_map=str(tmp_path / "map"))
    assert read_file_map(str(tmp_path / "map")) == {"val_2.JPEG": "n01"}
