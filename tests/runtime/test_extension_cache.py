"""Locks of compiled extensions: a live one is waited for, a dead one is named."""

import os
import sys
import threading
import time

import pytest

from dsmoe.base.errors import ConfigError
from dsmoe.runtime.extension_cache import folder, stale_locks, use_own_folder, wait_until_loadable


@pytest.fixture
def lock(tmp_path):
    file = tmp_path / "cpu_adam" / "lock"
    file.parent.mkdir()
    file.touch()
    return file


def _age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_folder_is_in_this_environment_unless_the_user_says_otherwise(tmp_path):
    environ: dict[str, str] = {}
    assert str(use_own_folder(environ)).startswith(sys.prefix)
    assert environ["TORCH_EXTENSIONS_DIR"] == str(folder({}))
    mine = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    assert use_own_folder(mine) == tmp_path


def test_two_environments_do_not_share_a_folder_even_if_read_only(monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(sys, "prefix", "/envs/a")
    first = folder({"XDG_CACHE_HOME": "/cache"})
    monkeypatch.setattr(sys, "prefix", "/envs/b")
    assert first != folder({"XDG_CACHE_HOME": "/cache"})
    assert str(first).startswith("/cache/")


def test_an_old_lock_that_nobody_holds_is_stale(tmp_path, lock):
    _age(lock, 1000)
    (found,) = stale_locks(tmp_path, quiet_seconds=300)
    assert found.path == lock
    assert 1000 <= found.quiet_seconds < 1010
    assert f"rm {lock}" in found.advice()


def test_a_young_lock_is_not_stale(tmp_path, lock):
    assert stale_locks(tmp_path, quiet_seconds=300) == []


def test_a_folder_in_which_something_is_being_written_is_not_stale(tmp_path, lock):
    _age(lock, 1000)
    (lock.parent / "cpu_adam.o").touch()
    assert stale_locks(tmp_path, quiet_seconds=300) == []


def test_a_lock_that_a_process_holds_open_is_not_stale(tmp_path, lock):
    with lock.open():
        _age(lock, 1000)
        assert stale_locks(tmp_path, quiet_seconds=300) == []
    assert len(stale_locks(tmp_path, quiet_seconds=300)) == 1


def test_absent_cache_has_no_locks(tmp_path):
    assert stale_locks(tmp_path / "absent") == []


def test_loading_past_a_dead_lock_is_refused_by_name(tmp_path, lock):
    _age(lock, 1000)
    with pytest.raises(ConfigError, match=r"cpu_adam.*lock was left by a build that died.*rm "):
        wait_until_loadable(tmp_path, "cpu_adam", quiet_seconds=300)


def test_a_dead_lock_is_refused_once_its_silence_is_long_enough(tmp_path, lock):
    started = time.monotonic()
    with pytest.raises(ConfigError):
        wait_until_loadable(tmp_path, "cpu_adam", quiet_seconds=0.5)
    assert 0.2 < time.monotonic() - started < 5


def test_a_live_build_is_waited_for(tmp_path, lock):
    told = []
    timer = threading.Timer(0.5, lock.unlink)
    timer.start()
    started = time.monotonic()
    wait_until_loadable(tmp_path, "cpu_adam", quiet_seconds=300, on_wait=told.append)
    timer.join()
    assert time.monotonic() - started > 0.3
    assert len(told) == 1
    assert "cpu_adam" in told[0]


def test_without_a_lock_it_returns_at_once(tmp_path):
    started = time.monotonic()
    wait_until_loadable(tmp_path, "cpu_adam")
    assert time.monotonic() - started < 1


def test_torch_names_its_lock_as_we_do(monkeypatch, tmp_path):
    """Against torch itself: where its just-in-time build of an extension called `x` keeps its lock."""
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    locks = []

    class Baton(cpp_extension.FileBaton):
        def __init__(self, path, *args, **kwargs):
            locks.append(path)
            raise KeyboardInterrupt  # stop before anything is compiled

    monkeypatch.setattr(cpp_extension, "FileBaton", Baton)
    with pytest.raises(KeyboardInterrupt):
        cpp_extension.load_inline("x", "int f() { return 1; }", functions="f")
    assert locks == [str(tmp_path / "x" / "lock")]
