"""The harness itself: it must return what ranks did, end what hangs, and leave nothing behind."""

import os
import time
from pathlib import Path

import preloaded_ranks
import pytest
from distributed_harness import assert_succeeded, launch
from preloaded_ranks import ForkServer


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


@pytest.fixture
def server(tmp_path):
    """A fork server that imports next to nothing, which is quick."""
    (tmp_path / "noisy.py").write_text("print('told when imported')\n")
    server = ForkServer(["noisy"], {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONFAULTHANDLER": "1"})
    yield server
    server.close()


def _forked(server, folder, argv, env=None):
    """(exit code, stdout, stderr) of a process that begins with the server's imports."""
    assert server.usable()
    out, err = folder / "out", folder / "err"
    return server.start(list(map(str, argv)), env or {}, folder, out, err).wait(), out.read_text(), err.read_text()


PLACE = """
import os, sys
print(sys.argv[1:], sys.path[0], os.environ.get("EXTRA"), "HOME" in os.environ, os.getcwd(), sys.stdin.read())
main = sys.modules["__main__"].__dict__
print("noisy" in sys.modules, main.get("__file__"), main is globals(), os.getpgrp() == os.getpid())
print("err", file=sys.stderr)
"""


def test_a_forked_process_is_placed_as_a_started_one(tmp_path, server):
    (tmp_path / "part").mkdir()
    script = _script(tmp_path / "part", PLACE)
    code, out, err = _forked(server, tmp_path, [script, "--x", 3], {"EXTRA": "e"})
    assert (code, err) == (0, "err\n")
    assert out == f"['--x', '3'] {tmp_path / 'part'} e False {tmp_path} \nTrue {script} True True\n"
    code, out, _ = _forked(server, tmp_path, ["-c", PLACE, "--x"])
    assert (code, out) == (0, f"['--x']  None False {tmp_path} \nTrue None True True\n")


ENDS = {
    "import atexit; atexit.register(print, 'late')": (0, "late\n", ""),
    "import sys; sys.exit(75)": (75, "", ""),
    "import sys; sys.exit('said')": (1, "", "said\n"),
    "raise ValueError('shown')": (1, "", "ValueError: shown\n"),
    "import os; os._exit(3)": (3, "", ""),
    "import os; os.kill(os.getpid(), 9)": (-9, "", ""),
    "import os; os.abort()": (-6, "", 'File "<string>", line 1 in <module>\n'),
    "import threading; threading.Timer(0.1, print, ['waited for']).start()": (0, "waited for\n", ""),
}


def test_a_forked_process_ends_as_a_started_one_and_the_next_begins_anew(tmp_path, server):
    for program, (code, out, err) in ENDS.items():
        found = _forked(server, tmp_path, ["-c", program])
        assert (*found[:2], err in found[2]) == (code, out, True), (program, found)
    assert _forked(server, tmp_path, ["-c", "import sys; sys.left_behind = 1"])[0] == 0
    assert _forked(server, tmp_path, ["-c", "import sys; print(hasattr(sys, 'left_behind'))"])[1] == "False\n"


def test_a_fork_server_that_cannot_import_says_why(tmp_path):
    server = ForkServer(["no_such_module"], {**os.environ, "PYTHONPATH": str(tmp_path)})
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        server.usable()
    server.close()


def test_where_imports_start_threads_nothing_is_forked(tmp_path, monkeypatch):
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()\n"
    )
    monkeypatch.setattr(preloaded_ranks, "MODULES", ["threaded"])
    monkeypatch.setattr(preloaded_ranks, "_servers", {})
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert preloaded_ranks.servers([env, env]) == [None, None]
    script = _script(tmp_path, "import sys\nprint('threaded' in sys.modules)\n")
    assert launch([script], world_size=1, preloaded=True)[0].stdout == "False\n"
