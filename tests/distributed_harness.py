"""Starts real processes as the ranks of a run on this machine (gloo, CPU), with a watchdog. For tests.

`launch` starts `python argv...` once a rank with the variables a launcher would set. Nothing outlives it:
each rank has a process group of its own, which is killed at the end, at the time limit, and when the caller
is interrupted. Most tests ask for `preloaded` ranks (preloaded_ranks); those about how a process starts do not.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import preloaded_ranks
from preloaded_ranks import PRELOADED, READ_AT_IMPORT, ForkServer

from dsmoe.runtime.launch_environment import free_port

_ROOT = Path(__file__).resolve().parents[1]
_LAUNCH_PREFIXES = ("SLURM_", "OMPI_", "PMI", "MPI_", "TORCHELASTIC_")
_LAUNCH_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
# After one rank failed its peers have this long to notice by themselves; they usually do in under a second.
_GRACE_SECONDS = 10.0
# For faulthandler to write the stacks of a rank that hangs.
_TRACE_SECONDS = 2.0


@dataclass(frozen=True)
class CompletedRank:
    """What one rank did. returncode is negative for a signal; killed says that the watchdog ended it."""

    rank: int
    returncode: int
    stdout: str
    stderr: str
    killed: bool = False


def launch(
    argv: Sequence[str | Path],
    world_size: int,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    preloaded: bool = False,
) -> list[CompletedRank]:
    """Run `python argv...` as `world_size` ranks and return what each did, in rank order.

    timeout: seconds after which all are ended, each leaving its Python stacks in stderr; ranks whose peer
    failed get 10 s. env: added to the inherited environment, from which launch variables are removed; one CPU
    thread a rank. preloaded: ranks 0 and 1 begin with torch and DeepSpeed imported. Returns also when ranks fail:
    see `assert_succeeded`.
    """
    servers: list[ForkServer | None] = [None] * world_size
    if preloaded:
        assert not READ_AT_IMPORT & (env or {}).keys(), "too late for preloaded ranks"
        first = range(min(world_size, PRELOADED))
        servers[: len(first)] = preloaded_ranks.servers([_environment(r, world_size, 0, None) for r in first])
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks: list[_Rank] = []
        try:
            for rank, server in enumerate(servers):
                ranks.append(_Rank(rank, argv, _environment(rank, world_size, port, env), Path(folder), server))
            _watch(ranks, time.monotonic() + timeout)
        finally:
            for rank in ranks:
                rank.end()
        return [rank.result() for rank in ranks]


def assert_succeeded(results: Sequence[CompletedRank]) -> None:
    """Fail with every rank's last lines unless all ended with code 0."""
    if all(r.returncode == 0 for r in results):
        return
    parts = []
    for r in results:
        ended = " (ended by the watchdog)" if r.killed else ""
        parts.append(f"--- rank {r.rank}: code {r.returncode}{ended}\n{r.stdout[-1500:]}{r.stderr[-3000:]}")
    raise AssertionError("not all ranks succeeded\n" + "\n".join(parts))


def _environment(rank: int, world_size: int, port: int, extra: Mapping[str, str] | None) -> dict[str, str]:
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCH_NAMES and not name.startswith(_LAUNCH_PREFIXES)
    }
    path = [str(_ROOT), str(_ROOT / "tests"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(entry for entry in path if entry)
    env.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1", PYTHONFAULTHANDLER="1", PYTHONUNBUFFERED="1",
    )  # fmt: skip
    env.update(extra or {})
    return env


def _watch(ranks: list["_Rank"], deadline: float) -> None:
    """Return when all ranks have ended, or after ending those that outlast the deadline or a failed peer's grace."""
    failed_at = None
    while any(rank.running() for rank in ranks):
        now = time.monotonic()
        if failed_at is None and any(rank.failed() for rank in ranks):
            failed_at = now
        if now > deadline or (failed_at is not None and now > failed_at + _GRACE_SECONDS):
            for rank in ranks:
                rank.ask_for_stacks()
            stop = time.monotonic() + _TRACE_SECONDS
            while any(rank.running() for rank in ranks) and time.monotonic() < stop:
                time.sleep(0.02)
            return
        time.sleep(0.02)


class _Rank:
    """One process, leader of its own process group, with its output in files (a full pipe would block it)."""

    def __init__(
        self, rank: int, argv: Sequence[str | Path], env: dict[str, str], folder: Path, server: ForkServer | None
    ) -> None:
        self.rank = rank
        self.killed = False
        self._out, self._err = folder / f"{rank}.out", folder / f"{rank}.err"
        words = [str(word) for word in argv]
        if server is not None:
            self._process = server.start(words, env, _ROOT, self._out, self._err)
            return
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, *words],
                env=env,
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def running(self) -> bool:
        return self._process.poll() is None

    def failed(self) -> bool:
        return self._process.poll() not in (None, 0)

    def ask_for_stacks(self) -> None:
        if self.running():
            self.killed = True
            self._process.send_signal(signal.SIGABRT)

    def end(self) -> None:
        """Kill whatever is left of the process group, children that outlived the rank included."""
        self.killed = self.killed or self.running()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # should it not have its own group yet
        self._process.wait()

    def result(self) -> CompletedRank:
        out, err = (file.read_text(encoding="utf-8", errors="replace") for file in (self._out, self._err))
        return CompletedRank(self.rank, self._process.returncode, out, err, self.killed)
