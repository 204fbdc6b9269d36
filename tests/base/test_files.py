"""Files appear whole or not at all, with the permissions of a plain open."""

import os

import pytest

from dsmoe.base.files import whole_file, write_whole


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_writing_replaces_whole_files_and_leaves_no_others(tmp_path):
    file = tmp_path / "f"
    write_whole(file, "old")
    with open(file) as reader:
        write_whole(file, "new")
        assert reader.read() == "old", "who has the file open keeps the whole old one"
    assert file.read_text() == "new"
    assert names(tmp_path) == ["f"]


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    file = tmp_path / "f"
    write_whole(file, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, "new")
    assert file.read_text() == "old"


def test_text_that_is_not_unicode_can_be_written(tmp_path):
    file = tmp_path / "f"
    write_whole(file, os.fsdecode(b"caf\xe9"))
    assert file.read_text() == "caf\\udce9"


def test_a_block_that_fails_leaves_nothing(tmp_path):
    def half():
        with whole_file(tmp_path / "f") as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert names(tmp_path) == []


def test_permissions_are_those_of_a_plain_open(tmp_path):
    (tmp_path / "plain").touch()
    with whole_file(tmp_path / "f") as temporary:
        temporary.touch(mode=0o600)
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode
