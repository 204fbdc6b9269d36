"""The harness itself: it must return what ranks did, end what hangs, and leave nothing behind."""

import os
import time
from pathlib import Path

import pytest
from distributed_harness import assert_succeeded, launch


def _script(folder: Path, text: str) -> Path:
    file = folder / "ranks.py"
    file.write_text(text)
    return file


def test_ranks_get_their_place_and_their_output_is_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "7")
    script = _script(
        tmp_path,
        "import os, sys\n"
        "names = ['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'EXTRA', 'SLURM_PROCID']\n"
        "print([os.environ.get(n) for n in names], sys.argv[1:])\n"
        "sys.stderr.write('err' + os.environ['RANK'])\n",
    )
    results = launch([script, "--x", 3], world_size=3, env={"EXTRA": "e"})
    assert_succeeded(results)
    assert [r.rank for r in results] == [0, 1, 2]
    assert [r.stderr for r in results] == ["err0", "err1", "err2"]
    for r in results:
        expected = [str(r.rank), str(r.rank), "3", "3", "127.0.0.1", "e", None]
        assert r.stdout == f"{expected} ['--x', '3']\n"


def test_output_larger_than_a_pipe_does_not_block(tmp_path):
    script = _script(tmp_path, "print('x' * 1_000_000)\n")
    (result,) = launch([script], world_size=1, timeout=30)
    assert len(result.stdout) == 1_000_001


def test_a_hang_is_ended_and_shows_where_it_hung(tmp_path):
    script = _script(tmp_path, "import time\ndef stuck_here():\n    time.sleep(300)\nstuck_here()\n")
    started = time.monotonic()
    results = launch([script], world_size=2, timeout=1.5)
    assert time.monotonic() - started < 15
    assert all(r.killed and r.returncode < 0 for r in results)
    assert all("stuck_here" in r.stderr for r in results)
    with pytest.raises(AssertionError, match="ended by the watchdog"):
        assert_succeeded(results)


def test_peers_of_a_failed_rank_do_not_use_up_the_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("distributed_harness._GRACE_SECONDS", 0.5)
    script = _script(
        tmp_path, "import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit(3)\ntime.sleep(300)\n"
    )
    started = time.monotonic()
    results = launch([script], world_size=2, timeout=120)
    assert time.monotonic() - started < 15
    assert (results[1].returncode, results[1].killed) == (3, False)
    assert results[0].killed


def test_a_child_that_outlives_its_rank_is_ended(tmp_path):
    script = _script(
        tmp_path,
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "print(child.pid)\n",
    )
    (result,) = launch([script], world_size=1, timeout=30)
    assert _gone(int(result.stdout))


def _gone(pid: int) -> bool:
    """Whether the process has ended (a zombie that nobody reaps counts); looks for up to 5 s."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
