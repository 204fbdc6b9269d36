"""A disk that is really full, and one that is really read-only: a small tmpfs of the test's own (needs root)."""

import logging
import shutil
import subprocess

import pytest
import torch

from dsmoe.base.run_folder import Lease, RunFolder
from dsmoe.checkpoint.manifest import Piece
from dsmoe.checkpoint.saver import Saver, require_space
from dsmoe.checkpoint.store import Store

MIB = 1 << 20


def mount(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")


@pytest.fixture
def small(tmp_path):
    """A run folder on a disk of 48 MiB."""
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    mount("-t", "tmpfs", "-o", "size=48m", "tmpfs", tmp_path)
    (tmp_path / "ckpt").mkdir()
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def save(saver, images_seen, mib, stated):
    tensor = torch.full((mib * MIB // 4,), float(images_seen))
    saver.begin(images_seen, [Piece("master", "w", tuple(tensor.shape), 0, tensor)], {}, stated * MIB)
    return saver.finish()


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_no_space_left_in_the_middle_of_a_shard(small, caplog):
    store = Store(small / "ckpt")
    saver = Saver(store, Lease.take(RunFolder(small)), 5)
    assert save(saver, 8, 20, stated=20)
    with caplog.at_level(logging.WARNING, logger="dsmoe"):
        assert not save(saver, 16, 40, stated=1)  # the look ahead is led to believe that it fits
    (line,) = warnings_of(caplog)
    assert "No space left on device" in line
    assert store.committed() == [8]
    assert store.damage(8) == ""
    assert not list(store.root.glob(".tmp-*")), "the space of what could not be finished is given back"
    assert save(saver, 24, 1, stated=1), "once there is room, saving works again"


def test_too_little_space_is_noticed_before_writing(small, caplog):
    store = Store(small / "ckpt")
    saver = Saver(store, Lease.take(RunFolder(small)), 5)
    with pytest.raises(OSError, match=r"needs 40\.0 MiB in .*ckpt and 4\d\.\d MiB are free"):
        require_space(store, 40 * MIB)
    with caplog.at_level(logging.WARNING, logger="dsmoe"):
        assert not save(saver, 8, 40, stated=40)
    (line,) = warnings_of(caplog)
    assert "a checkpoint needs 40.0 MiB" in line
    assert store.committed() == []


def test_a_disk_that_became_read_only(small, caplog):
    store = Store(small / "ckpt")
    saver = Saver(store, Lease.take(RunFolder(small)), 5)
    assert save(saver, 8, 1, stated=1)
    mount("-o", "remount,ro", small)
    with caplog.at_level(logging.WARNING, logger="dsmoe"):
        assert not save(saver, 16, 1, stated=1)
    (line,) = warnings_of(caplog)
    assert "Read-only file system" in line
    assert store.committed() == [8]
