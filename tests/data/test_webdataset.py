"""Tars: what counts as an item, which label it has, and what happens to what is damaged."""

import gzip
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from made_images import pixels, png
from made_shards import samples, tar
from shared_data import require

from dsmoe.base.errors import DataError
from dsmoe.data.dataset import FaultReporter
from dsmoe.data.webdataset import WebDataset


def photos(total: int, first: int = 0) -> list[tuple[str, bytes, int]]:
    return [(f"k{i:03d}", png(i, 8, 8), i % 3) for i in range(first, first + total)]


def names(dataset: WebDataset) -> list[str]:
    return [dataset.name(i) for i in range(len(dataset))]


def faults(dataset: WebDataset) -> dict[str, str]:
    """Name -> reason of every damaged item."""
    for i in range(len(dataset)):
        dataset.read(i)
    return {fault.name: fault.reason for fault in dataset.drain_faults()}


def test_items_by_tar_then_member(tmp_path: Path) -> None:
    tar(tmp_path / "t-10.tar", samples(photos(3, 3)))
    tar(tmp_path / "t-09.tar", samples(photos(3)))
    dataset = WebDataset(tmp_path, 8)
    assert isinstance(dataset, FaultReporter)
    assert names(dataset) == [f"t-{9 if i < 3 else 10:02d}.tar/k{i:03d}" for i in range(6)]
    assert (dataset.num_classes, dataset.class_names) == (3, ("0", "1", "2"))
    for i in range(6):
        image, label = dataset.read(i)
        assert np.array_equal(image, pixels(i, 8, 8))
        assert label == i % 3


def test_samples_of_every_usual_form(tmp_path: Path) -> None:
    tar(
        tmp_path / "t.tar",
        [
            ("a.cls", b"1\n"), ("a.json", b'{"label": 0}'), ("a.PNG", png(0, 8, 8)),  # cls goes before json
            ("dir/b.jpeg", png(1, 8, 8)), ("dir/b.json", b'{"label": 2}'),
            ("b.webp", png(2, 8, 8)), ("b.json", b'{"cls": "0"}'), ("b.json", b"[1]"),
            ("._c.jpg", b"resource fork"), ("c.jpg", png(3, 8, 8)), ("._c.cls", b"fork"), ("c.cls", b"1"),
            ("README.md", b"no sample"), ("meta.json", b'{"shards": 3}'), ("d.seg.png", b"no image of ours"),
        ],
    )  # fmt: skip
    dataset = WebDataset(tmp_path / "t.tar", 8)
    assert names(dataset) == ["t.tar/a", "t.tar/dir/b", "t.tar/b", "t.tar/c"]
    assert [dataset.read(i)[1] for i in range(4)] == [1, 2, 0, 1]
    assert all(np.array_equal(dataset.read(i)[0], pixels(i, 8, 8)) for i in range(4))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_every_tar_format(tmp_path: Path, format: int) -> None:
    key = "é" * 20 if format == tarfile.USTAR_FORMAT else "é" * 90
    tar(tmp_path / "t.tar", samples([(key, png(1, 8, 8), 0)]), format)
    dataset = WebDataset(tmp_path, 8)
    assert dataset.name(0) == f"t.tar/{key}"
    assert np.array_equal(dataset.read(0)[0], pixels(1, 8, 8))


def test_labels_that_are_words_are_sorted(tmp_path: Path) -> None:
    tar(tmp_path / "t.tar", samples([("a", png(0), "n02"), ("b", png(1), "n01")]))
    dataset = WebDataset(tmp_path, 8)
    assert dataset.class_names == ("n01", "n02")
    assert [dataset.read(i)[1] for i in range(2)] == [1, 0]


def _damaged_tar(tmp_path: Path, change: object) -> WebDataset:
    """Nine samples in a tar of nine and a good tar of three behind it; change(bytes) of the first."""
    first = tar(tmp_path / "0.tar", samples(photos(9)))
    tar(tmp_path / "1.tar", samples(photos(3, 9)))
    first.write_bytes(change(bytearray(first.read_bytes())))
    return WebDataset(tmp_path, 8, max_bad_fraction=0.5)


def _at(content: bytes, name: str) -> int:
    return bytes(content).index(name.encode())


def _cut(name: str, more: int) -> object:
    return lambda content: content[: _at(content, name) + more]


# A sample here takes 3072 bytes: three headers and three contents of one block each.
@pytest.mark.parametrize(
    ("change", "items", "damaged"),
    [
        (_cut("k008.jpg", 600), 9, {"0.tar/k008": "the tar ends within it"}),
        (_cut("k008.jpg", 300), 9, {f"0.tar/at byte {8 * 3072}": "no image in its sample"}),  # within its header
        (_cut("k008.cls", 300), 9, {"0.tar/k008": "no label"}),
        (_cut("k008.cls", 512), 9, {"0.tar/k008": "no label"}),
        (_cut("k008.json", 300), 10, {f"0.tar/at byte {8 * 3072 + 2048}": "no image in its sample"}),
        (_cut("k008.json", 513), 9, {}),
        (_cut("k008.json", 0), 9, {}),  # no end mark, whole samples
    ],
)  # fmt: skip
def test_the_last_sample_of_a_tar_cut_short_is_one_damaged_item(
    tmp_path: Path, change: object, items: int, damaged: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    dataset = _damaged_tar(tmp_path, change)
    assert len(dataset) == items + 3
    assert faults(dataset) == damaged
    if damaged:
        image, label = dataset.read(items - 1)  # the first of the next tar stands in
        assert np.array_equal(image, pixels(9, 8, 8))
        assert label == 0
        assert "1 samples of" in caplog.text
    assert np.array_equal(dataset.read(items)[0], pixels(9, 8, 8))


def test_an_image_cut_short_behind_its_label_is_told_as_such(tmp_path: Path) -> None:
    members = [("a.cls", b"0"), ("a.jpg", png(0, 8, 8)), ("b.cls", b"1"), ("b.jpg", png(1, 8, 8))]
    file = tar(tmp_path / "t.tar", members)
    content = file.read_bytes()
    file.write_bytes(content[: _at(content, "b.jpg") + 512 + 60])
    dataset = WebDataset(tmp_path, 8)
    assert faults(dataset) == {"t.tar/b": "the tar ends within it"}
    assert dataset.read(1)[1] == 0


@pytest.mark.parametrize(("member", "sample"), [("k004.jpg", 4), ("k004.cls", 4), ("k000.jpg", 0)])
def test_what_lies_behind_a_damaged_header_is_found_again(tmp_path: Path, member: str, sample: int) -> None:
    def spoil(content: bytearray) -> bytearray:
        content[_at(content, member) + 150] ^= 0xFF  # the header's checksum
        return content

    dataset = _damaged_tar(tmp_path, spoil)
    assert len(dataset) == 12
    assert list(faults(dataset)) == [f"0.tar/k{sample:03d}"]
    for i in set(range(12)) - {sample}:
        assert np.array_equal(dataset.read(i)[0], pixels(i, 8, 8))


def test_damaged_images_keep_their_place(tmp_path: Path) -> None:
    good = photos(6)
    good[2] = ("k002", b"no image", 2)
    good[4] = ("k004", b"", 1)
    tar(tmp_path / "t.tar", samples(good))
    dataset = WebDataset(tmp_path, 8)
    assert len(dataset) == 6
    assert faults(dataset) == {"t.tar/k002": "not an image", "t.tar/k004": "no image in its sample"}
    assert dataset.read(2)[1] == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"t.tar": gzip.compress(b"x" * 2000)}, r"t.tar' is compressed \(gzip\).* `gunzip`"),
        ({"t.tar": b"version https://git-lfs.github.com/spec/v1\n"}, r"t.tar' is no tar \(truncated header\); give"),
        ({"t.tar": b"<html>" * 1000}, r"t.tar' is no tar \(no header in it\); give an uncompressed tar"),
        ({"t.tar": b""}, r"t.tar' is no tar \(empty file\)"),
        ({"t.tar": b"\0" * 10240}, "hold no samples; give an uncompressed tar"),
        ({"t.tar": [("a.jpg", png(0)), ("b.jpg", png(1))]}, "2 of the 2 samples of data.path .* have no label; give"),
        ({"t.tar": [("a.cls", b"0"), ("b.cls", b"1")]}, "2 of the 2 samples of data.path .* have no image; give"),
        ({"t.tar": [("a.jpg", png(0)), ("a.cls", b"-1")]}, "holds label -1: test splits carry it"),
        ({"t.tar": [("a.jpg", png(0)), ("a.cls", b"99999999")]}, "holds label 99999999, which would need as many"),
        ({"t.tar": [("n01.tar", b"x")]}, "hold no samples; give"),
    ],
)
def test_unusable_tars(tmp_path: Path, files: dict, message: str) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            tar(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        WebDataset(tmp_path, 8)
    assert "\n" not in str(caught.value)


def test_a_header_that_points_backwards_is_refused(tmp_path: Path) -> None:
    """Python's tarfile follows a negative size (base-256) for ever."""
    file = tar(tmp_path / "t.tar", samples(photos(2)))
    content = bytearray(file.read_bytes())
    start = _at(content, "k001.jpg")
    header = content[start : start + 512]
    header[124:136] = (-2048).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[start : start + 512] = header
    file.write_bytes(content)
    with pytest.raises(DataError, match="points backwards"):
        WebDataset(tmp_path, 8)


def test_a_tar_that_changes_or_vanishes_under_a_run(tmp_path: Path) -> None:
    file = tar(tmp_path / "t.tar", samples(photos(2)))
    dataset = WebDataset(tmp_path, 8)
    tar(file, samples(photos(9)))
    with pytest.raises(DataError, match="has changed since the run began"):
        dataset.read(0)
    file.unlink()
    with pytest.raises(DataError, match=r"cannot read .*t.tar': No such file"):
        dataset.read(0)


def test_open_files_do_not_travel(tmp_path: Path) -> None:
    tar(tmp_path / "t.tar", samples(photos(40)))
    dataset = WebDataset(tmp_path, 8)
    dataset.read(0)
    content = pickle.dumps(dataset)
    assert len(content) < 2000  # the index travels as its path
    assert np.array_equal(pickle.loads(content).read(7)[0], pixels(7, 8, 8))


def test_real_tar(tmp_path: Path) -> None:
    dataset = WebDataset(require("perception", "imagenet", "imagenet_wds"), 64, index_folder=str(tmp_path))
    assert (len(dataset), dataset.num_classes) == (16, 16)
    assert dataset.name(0) == "imagenet1k-train-0000.tar/n01440764_tench"
    assert [dataset.read(i)[1] for i in range(16)] == list(range(16))
    assert dataset.drain_faults() == ()
