"""The index of items: compact, mapped, made once by whoever comes, and never trusted when anything has changed."""

import json
import multiprocessing
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from made_shards import index_files

from dsmoe.base.errors import DataError
from dsmoe.data import index_file
from dsmoe.data.index_file import BESIDE, Shard, kept_index
from dsmoe.data.item_index import NO_LABEL, ItemIndex, concatenate, one_shard


def made(shard: str, labels: list[str | None], first: int = 0) -> ItemIndex:
    names = [f"item{first + i}" for i in range(len(labels))]
    return one_shard(
        "made", shard, labels, names, sizes=range(len(labels)), offsets=[70000 * i for i in range(len(labels))]
    )


def content(index: ItemIndex) -> dict:
    return {key: array.tolist() for key, array in index.arrays.items()} | {"s": index.shards, "c": index.classes}


def test_concatenation_renumbers_labels_and_starts() -> None:
    index = concatenate([made("a", ["x", None, "z"]), made("b", []), made("c", ["y", "z"], 3)])
    assert index.classes == ("x", "y", "z")
    assert index.arrays["labels"].tolist() == [0, NO_LABEL, 2, 1, 2]
    assert index.arrays["shard_starts"].tolist() == [0, 3, 3, 5]
    assert [index.shard_of(i) for i in range(5)] == [0, 0, 0, 2, 2]
    assert [index.name_of(i) for i in range(5)] == [f"item{i}" for i in range(5)]
    assert index.arrays["offsets"].tolist() == [0, 70000, 140000, 0, 70000]


def test_the_fingerprint_is_of_names_sizes_and_labels_however_the_index_was_made() -> None:
    a, b = made("a", ["x", "z"]), made("b", ["y"], 2)
    whole = concatenate([a, b]).fingerprint
    assert len(whole) == 16
    assert concatenate([concatenate([a]), concatenate([b])]).fingerprint == whole
    moved = made("b", ["y"], 2)
    moved.arrays["offsets"] = moved.arrays["offsets"] + 512
    assert concatenate([a, moved]).fingerprint == whole  # where it lies is not what it is
    others = [made("c", ["y"], 2), made("b", ["z"], 2), made("b", ["y"], 7), made("b", [None], 2)]
    larger = made("b", ["y"], 2)
    larger.arrays["sizes"] = larger.arrays["sizes"] + 1
    assert len({concatenate([a, other]).fingerprint for other in [*others, larger]} - {whole}) == 5


def test_a_saved_index_is_mapped_and_travels_as_its_path(tmp_path: Path) -> None:
    index = concatenate([made("a", ["x", "z"] * 500)])
    index.save(tmp_path / "i.safetensors", stamp="1")
    mapped = ItemIndex.load(tmp_path / "i.safetensors", stamp="1")
    assert content(mapped) == content(index)
    assert mapped.fingerprint == index.fingerprint
    travelled = pickle.dumps(mapped)
    assert len(travelled) < 1000
    assert content(pickle.loads(travelled)) == content(index)
    made("a", ["x"]).save(tmp_path / "i.safetensors", stamp="1")
    with pytest.raises(DataError, match="was replaced while it was in use; start the run again"):
        pickle.loads(travelled)


def test_a_damaged_or_foreign_file_is_no_index(tmp_path: Path) -> None:
    file = tmp_path / "i.safetensors"
    assert ItemIndex.load(file, stamp="1") is None
    concatenate([made("a", ["x", "z"] * 50)]).save(file, stamp="1")
    good = file.read_bytes()
    assert ItemIndex.load(file, stamp="2") is None
    header = 8 + int.from_bytes(good[:8], "little")
    for place in (3, 9, 40, header, len(good) - 1, (header + len(good)) // 2):
        file.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        assert ItemIndex.load(file, stamp="1") is None, place
    for end in (0, 5, 100, len(good) - 1):
        file.write_bytes(good[:end])
        assert ItemIndex.load(file, stamp="1") is None, end
    file.write_bytes(good)
    assert ItemIndex.load(file, stamp="1") is not None


def test_imagenet_takes_less_than_60_mb_and_no_python_object_an_item(tmp_path: Path) -> None:
    """1.3 million members with names as long as ImageNet's, in 1000 tars, as `scan_tar` would leave them."""
    total, shards = 1_300_000, 1000
    names = "".join(f"n{i % 1000:08d}_{i:05d}"[:15].ljust(15, "0") for i in range(total)).encode()
    arrays = {
        "labels": np.arange(total) % 1000,
        "shard_starts": np.arange(shards + 1) * (total // shards),
        "names": np.frombuffer(names, dtype=np.uint8),
        "name_starts": np.arange(total + 1) * 15,
        "sizes": 100_000 + np.arange(total) % 50_000,
        "offsets": np.arange(total) % 1300 * 115_000,
    }
    whole = ItemIndex("made", [str(i) for i in range(shards)], [f"{i:03d}" for i in range(1000)], arrays)
    concatenate([whole]).save(tmp_path / "i.safetensors", stamp="")
    tracemalloc.start()
    index = ItemIndex.load(tmp_path / "i.safetensors", stamp="")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert index.nbytes < 60e6
    assert index.nbytes / total < 30  # bytes an item: 15 of name, 4 + 4 + 4 of places and size, 2 of label
    assert held < 1e6  # the arrays are pages of the file, shared by all processes of a host
    assert index.name_of(total - 1) == "n00000999_12999"


def _shards(root: Path, count: int) -> list[Shard]:
    for i in range(count):
        (root / f"s{i}").write_text(str(i))
    return [Shard.of(root / f"s{i}", f"s{i}") for i in range(count)]


def _scan(shard: Shard) -> ItemIndex:
    with open(shard.path.parent / "scans", "a") as log:
        log.write(f"{shard.name}\n")
    return made(shard.name, ["x", shard.path.read_text()])


def _scans(root: Path) -> list[str]:
    return (root / "scans").read_text().split() if (root / "scans").exists() else []


def test_an_index_is_made_once_and_made_again_when_a_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "PARTS", 3)
    shards = _shards(tmp_path, 7)
    first = kept_index("made", tmp_path, shards, _scan)
    again = kept_index("made", tmp_path, shards, _scan)
    assert content(first) == content(again) == content(concatenate([_scan(shard) for shard in shards]))
    assert len(_scans(tmp_path)) == 14
    assert len([name for name in index_files(tmp_path) if name.endswith(".safetensors")]) == 1
    assert not any(name.endswith(".parts") for name in index_files(tmp_path))
    os.utime(tmp_path / "s3", ns=(1, 1))
    kept_index("made", tmp_path, [Shard.of(shard.path, shard.name) for shard in shards], _scan)
    assert len(_scans(tmp_path)) == 21
    kept_index("made", tmp_path, shards[:2], _scan)  # another set: an index of its own
    assert len([name for name in index_files(tmp_path) if name.endswith(".safetensors")]) == 2


def test_what_a_killed_process_has_done_is_not_done_again(tmp_path: Path) -> None:
    shards = _shards(tmp_path, 5)

    def dies(shard: Shard) -> ItemIndex:
        if shard.name == "s3":
            raise KeyboardInterrupt
        return _scan(shard)

    with pytest.raises(KeyboardInterrupt):
        kept_index("made", tmp_path, shards, dies)
    assert _scans(tmp_path) == ["s0", "s1", "s2"]
    kept_index("made", tmp_path, shards, _scan)
    assert _scans(tmp_path) == ["s0", "s1", "s2", "s3", "s4"]


def _build(root: Path, count: int, barrier: object, answers: object) -> None:
    barrier.wait()
    index = kept_index("made", root, [Shard.of(root / f"s{i}", f"s{i}") for i in range(count)], _scan)
    answers.put(json.dumps(content(index)))


def test_processes_share_the_scanning_out(tmp_path: Path) -> None:
    _shards(tmp_path, 40)
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(4), fork.Queue()
    workers = [fork.Process(target=_build, args=(tmp_path, 40, barrier, answers)) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert len({answers.get(timeout=60) for _ in workers}) == 1
    for worker in workers:
        worker.join()
    assert sorted(_scans(tmp_path)) == sorted(f"s{i}" for i in range(40))  # each shard once


def test_where_the_index_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "data"
    root.mkdir()
    shards = _shards(root, 2)
    kept_index("made", root, shards, _scan, str(tmp_path / "given"))
    assert not (root / BESIDE).exists()
    assert len(list((tmp_path / "given").glob("made-data-*.safetensors"))) == 1
    root.chmod(0o555)  # also root respects it: the data was locked on purpose
    kept_index("made", root, shards, _scan)
    assert not (root / BESIDE).exists()
    assert len(list((tmp_path / "cache/dsmoe/index").glob("made-data-*.safetensors"))) == 1
    (tmp_path / "cache").rename(tmp_path / "old")
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be kept in .*/cache/dsmoe/index: .*; give data.index_folder=FOLDER"):
        kept_index("made", root, shards, _scan)
    with pytest.raises(DataError, match=r"cannot be kept in .*; give another data.index_folder"):
        kept_index("made", root, shards, _scan, str(tmp_path / "cache" / "x"))
    root.chmod(0o755)


def test_without_file_locks_every_process_works_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(index_file.fcntl, "lockf", no_locks)
    assert len(kept_index("made", tmp_path, _shards(tmp_path, 3), _scan)) == 6


def test_a_full_disk_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ItemIndex, path: Path, **metadata: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ItemIndex, "save", full)
    with pytest.raises(DataError, match=r"cannot write the index .*: .*No space left on device; make room or give"):
        kept_index("made", tmp_path, _shards(tmp_path, 3), _scan)
