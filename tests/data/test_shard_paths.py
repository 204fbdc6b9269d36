"""What a data.path for shards means."""

from pathlib import Path

import pytest

from dsmoe.base.errors import DataError
from dsmoe.data.shard_paths import shard_files


def made(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * len(name))
    return root


def names(path: object, ending: str = ".tar") -> list[str]:
    return [shard.name for shard in shard_files(str(path), ending)[1]]


def test_a_folder_a_file_a_glob_and_a_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, "t-1.tar", "t-0.tar", "t-10.tar", ".t-3.tar", "t-2.parquet", "notes.txt", "sub/t-0.tar")
    assert names(tmp_path) == ["t-0.tar", "t-1.tar", "t-10.tar"]
    assert names(tmp_path, ".parquet") == ["t-2.parquet"]
    assert names(tmp_path / "t-1.tar") == ["t-1.tar"]
    assert names(tmp_path / "t-?.tar") == ["t-0.tar", "t-1.tar"]
    assert names(tmp_path / "**" / "t-0.tar") == ["sub/t-0.tar", "t-0.tar"]
    assert names(tmp_path / "t-{0..1}.tar") == ["t-0.tar", "t-1.tar"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("~/t-{1..1}.tar") == ["t-1.tar"]
    root, shards = shard_files(str(tmp_path), ".tar")
    assert root == tmp_path
    assert [shard.size for shard in shards] == [7, 7, 8]


def test_the_hubs_sub_folder_is_pointed_at(tmp_path: Path) -> None:
    made(tmp_path, "hub/data/train-0-of-1.parquet", "hub/README.md")
    with pytest.raises(DataError, match=r"means no .parquet file; data.path=.*/hub/data holds some, or give a folder"):
        names(tmp_path / "hub", ".parquet")


def test_ranges_keep_their_zeros_and_multiply(tmp_path: Path) -> None:
    made(tmp_path, *(f"{a}/t-{b:04d}.tar" for a in range(2) for b in range(8, 12)))
    assert names(tmp_path / "{0..1}" / "t-{0008..0011}.tar") == [
        f"{a}/t-{b:04d}.tar" for a in range(2) for b in range(8, 12)
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("t-{0..3}.tar", r"2 of the 4 files of data.path .* do not exist: .*t-2.tar, .*t-3.tar; copy them or correct"),
        ("t-{3..0}.tar", r"has the range \{3..0\}; its bounds rise"),
        ("t-{0..9999999}.tar", "by at most 1000000 files"),
        ("t-{a,b}.tar", r"braces that are no range of numbers such as \{0000..1023\}; give a folder"),
        ("none.tar", "does not exist; give a folder of .tar files, a glob"),
        ("none-*.tar", "means no .tar file; give"),
        ("t-0.tgz", "means .*t-0.tgz', which is no .tar file; give"),
        ("empty", "means no .tar file; give a folder"),
        ("half", r"holds 2 of 3 .tar files; copy the others, or take what is there by a glob .*/half/\*.tar'"),
        ("both", r"holds .tar files of 2 sets \(train-\*.tar, val-\*.tar\); .* 'data.path=.*/both/train-\*.tar'"),
    ],
)
def test_paths_that_mean_nothing(tmp_path: Path, path: str, message: str) -> None:
    made(tmp_path, "t-0.tar", "t-1.tar", "t-0.tgz", "both/train-0.tar", "both/train-1.tar", "both/val-0.tar", "empty/x",
         "half/t-0-of-3.tar", "half/t-2-of-3.tar")  # fmt: skip
    assert names(tmp_path / "half" / "*.tar") == ["t-0-of-3.tar", "t-2-of-3.tar"]
    with pytest.raises(DataError, match=message) as caught:
        names(tmp_path / path)
    assert "\n" not in str(caught.value)
