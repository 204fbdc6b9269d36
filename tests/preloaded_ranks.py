"""Processes that begin with torch and DeepSpeed imported. For distributed_harness.

Importing what an engine imports takes more CPU than most distributed tests train. Here one process per rank number does
it once and is forked for each launch (fork_server). The ranks of a launch come from different ones, so they differ in
what they would differ in: hash seed, addresses, numpy's global generator. dsmoe itself is imported anew by each.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# What others wrote that a training rank imports sooner or later: an optimizer of torch imports dynamo, DeepSpeed's
# engine calls torch.compile, rank 0 draws a plot.
MODULES = ("torch", "torch._dynamo", "torch._inductor.compile_fx", "deepspeed", "matplotlib.backends.backend_agg")
# Ranks; the few tests with more would not win by it.
PRELOADED = 2
# Read when those are imported, so that a launch cannot ask for other values.
READ_AT_IMPORT = {"OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "PYTHONPATH"}
_SERVER = Path(__file__).with_name("fork_server.py")
_IMPORT_SECONDS = 240.0
_ANSWER_SECONDS = 30.0
_servers: dict[int, "ForkServer"] = {}


def servers(envs: Sequence[Mapping[str, str]]) -> list["ForkServer | None"]:
    """One a rank, ready; those that are missing are made and import at the same time, each in its environment.

    None where the imports start threads, as other versions of them may: such ranks have to begin without.
    """
    for rank, env in enumerate(envs):
        if rank not in _servers:
            _servers[rank] = ForkServer(MODULES, env)
    return [_servers[rank] if _servers[rank].usable() else None for rank in range(len(envs))]


class ForkServer:
    """A process that has imported `modules` and is forked, for one process at a time."""

    def __init__(self, modules: Sequence[str], env: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- as long as the process
        self._process = subprocess.Popen(
            [sys.executable, _SERVER, *modules], env=dict(env), bufsize=0, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self._read = b""
        self._state = ""
        atexit.register(self.close)

    def start(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, out: Path, err: Path) -> "ForkedProcess":
        """Begin `python argv...` with its output in these files; when `usable`."""
        request = {"argv": list(argv), "env": dict(env), "cwd": str(cwd), "stdout": str(out), "stderr": str(err)}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        return ForkedProcess(self, int(self._expect(_ANSWER_SECONDS)))

    def usable(self) -> bool:
        """Wait until all is imported; whether it can be forked, which a process with threads cannot."""
        if not self._state:
            self._state = self._expect(_IMPORT_SECONDS)
        return self._state == "ready"

    def answer(self, seconds: float) -> str | None:
        """The next line, or None if none comes in time; RuntimeError if the server has ended."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._read:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                return None
            read = os.read(self._process.stdout.fileno(), 4096)
            if not read:
                raise RuntimeError(f"the fork server has ended: {self._said()}")
            self._read += read
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()

    def close(self) -> None:
        """End it; a second call does nothing."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._errors.close()
        atexit.unregister(self.close)

    def _expect(self, seconds: float) -> str:
        line = self.answer(seconds)
        if line is None:
            raise RuntimeError(f"the fork server did not answer within {seconds:.0f} s: {self._said()}")
        return line

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-2000:]


class ForkedProcess:
    """As subprocess.Popen, so far as the harness uses it."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        if self.returncode is None:
            answer = self._server.answer(0)
            self.returncode = None if answer is None else int(answer)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
