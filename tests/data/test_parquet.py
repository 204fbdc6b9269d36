"""Parquet files as ImageNet has them on the Hugging Face hub."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from made_images import pixels, png
from made_shards import parquet
from shared_data import require

from dsmoe.base.errors import ConfigError, DataError
from dsmoe.data import build_dataset

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet")

from dsmoe.data import parquet as module  # noqa: E402 - after the skip
from dsmoe.data.parquet import ParquetImages  # noqa: E402


def _images(total: int, first: int = 0) -> list[bytes]:
    return [png(i, 8, 8) for i in range(first, first + total)]


def _table(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_items_by_file_then_row(tmp_path: Path) -> None:
    parquet(tmp_path / "train-00001.parquet", _images(4, 7), [i % 3 for i in range(7, 11)], group=3)
    parquet(tmp_path / "train-00000.parquet", _images(7), [i % 3 for i in range(7)], group=3)
    dataset = ParquetImages(tmp_path, 8)
    assert (len(dataset), dataset.num_classes, dataset.group_rows) == (11, 3, 3)
    assert [dataset.name(i) for i in (0, 6, 7, 10)] == [
        f"train-0000{f}.parquet:{r}" for f, r in ((0, 0), (0, 6), (1, 0), (1, 3))
    ]
    for i in reversed(range(11)):
        image, label = dataset.read(i)
        assert np.array_equal(image, pixels(i, 8, 8))
        assert label == i % 3
    assert dataset.groups_decoded == 5  # 3 + 2, each once


def test_plain_bytes_and_labels_in_words(tmp_path: Path) -> None:
    file = _table(tmp_path / "t.parquet", label=["n02", "n01"], image=_images(2), other=[1, 2])
    dataset = ParquetImages(file, 8)
    assert dataset.class_names == ("n01", "n02")
    assert [dataset.read(i)[1] for i in range(2)] == [1, 0]
    assert np.array_equal(dataset.read(1)[0], pixels(1, 8, 8))


def test_class_names_of_the_hub(tmp_path: Path) -> None:
    names = ["tench, Tinca tinca", "crane", "goldfish", "crane"]
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    parquet(tmp_path / "t.parquet", _images(2), [2, 0], huggingface=features)
    dataset = ParquetImages(tmp_path, 8)
    assert dataset.class_names == ("tench", "crane 1", "goldfish", "crane 3")
    assert [dataset.read(i)[1] for i in range(2)] == [2, 0]


def test_the_cache_keeps_what_was_used_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "t.parquet", _images(9), [0] * 9, group=3)
    dataset = ParquetImages(tmp_path, 8)
    size = sum(len(image) for image in _images(3))
    monkeypatch.setattr(module, "CACHE_BYTES", 2.5 * size)  # two groups of three
    for item, decoded in ((0, 1), (3, 2), (1, 2), (6, 3), (2, 3), (4, 4), (8, 5)):
        dataset.read(item)
        assert dataset.groups_decoded == decoded, item
    monkeypatch.setattr(module, "CACHE_BYTES", 1)  # one is always kept
    dataset.read(0)
    dataset.read(1)
    assert dataset.groups_decoded == 6


def test_damaged_rows_and_groups_keep_their_place(tmp_path: Path) -> None:
    images = _images(9)
    images[1], images[2] = b"no image", None
    labels = [0, 1, 2, 0, None, 2, 0, 1, 2]
    file = parquet(tmp_path / "t.parquet", images, labels, group=3)
    content = bytearray(file.read_bytes())
    column = pq.read_metadata(file).row_group(2).column(0)
    for place in range(column.data_page_offset, column.data_page_offset + 40):
        content[place] ^= 0xFF
    file.write_bytes(content)
    dataset = ParquetImages(tmp_path, 8, max_bad_fraction=1)
    given = [dataset.read(i)[1] for i in range(9)]
    assert given == [0, 0, 0, 0, 2, 2, 0, 0, 0]
    reasons = {fault.name: fault.reason for fault in dataset.drain_faults()}
    assert reasons.keys() == {f"t.parquet:{i}" for i in (1, 2, 4, 6, 7, 8)}
    assert reasons["t.parquet:1"] == "not an image"
    assert reasons["t.parquet:2"] == "no bytes in its row"
    assert reasons["t.parquet:4"] == "no label"
    assert reasons["t.parquet:7"].startswith("row group 2: ")


def test_unusable_files(tmp_path: Path) -> None:
    def refused(message: str, file: Path) -> None:
        with pytest.raises(DataError, match=message) as caught:
            ParquetImages(file, 8)
        assert "\n" not in str(caught.value)

    good = parquet(tmp_path / "good.parquet", _images(4), [0, 1, 2, 3]).read_bytes()
    cut, text = tmp_path / "cut.parquet", tmp_path / "text.parquet"
    cut.write_bytes(good[:-100])
    text.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(r"cut.parquet' is no parquet file or was cut short \(.*\); copy it again", cut)
    refused(r"text.parquet' is no parquet file or was cut short", text)
    images = _images(2)
    refused(
        "has columns img, label; dsmoe reads columns image", _table(tmp_path / "a.parquet", img=images, label=[0, 1])
    )
    refused("has columns image; dsmoe reads", _table(tmp_path / "b.parquet", image=images))
    refused("has columns image, label; dsmoe reads", _table(tmp_path / "c.parquet", image=[1, 2], label=[0, 1]))
    refused("has columns image, label", _table(tmp_path / "d.parquet", image=images, label=[0.5, 1]))
    refused("holds label -1: test splits", _table(tmp_path / "e.parquet", image=images, label=[-1, -1]))
    refused(
        "2 of the 2 rows of data.path .* have no label",
        _table(tmp_path / "f.parquet", image=images, label=pa.array([None, None], pa.int64())),
    )
    empty = _table(tmp_path / "g.parquet", image=pa.array([], pa.binary()), label=pa.array([], pa.int64()))
    refused("hold no rows", empty)


def test_without_pyarrow_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="needs pyarrow, which is not installed; pip install pyarrow"):
        build_dataset("parquet", path=tmp_path, resolution=8)


def test_neither_open_files_nor_rows_travel(tmp_path: Path) -> None:
    parquet(tmp_path / "t.parquet", _images(40), [0] * 40, group=40)
    dataset = ParquetImages(tmp_path, 8)
    dataset.read(0)
    content = pickle.dumps(dataset)
    assert len(content) < 2000
    assert np.array_equal(pickle.loads(content).read(7)[0], pixels(7, 8, 8))


def test_real_file_holds_the_photos_of_the_real_tar(tmp_path: Path) -> None:
    rows = build_dataset(
        "parquet",
        path=require("perception", "imagenet", "imagenet_parquet", "data"),
        resolution=64,
        index_folder=str(tmp_path),
    )
    tars = build_dataset(
        "webdataset", path=require("perception", "imagenet", "imagenet_wds"), resolution=64, index_folder=str(tmp_path)
    )
    assert len(rows) == len(tars) == 16
    for i in range(16):
        assert rows.read(i)[1] == tars.read(i)[1] == i
        assert np.array_equal(rows.read(i)[0], tars.read(i)[0])
    assert rows.drain_faults() == ()
