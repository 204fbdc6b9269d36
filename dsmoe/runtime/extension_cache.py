"""Where just-in-time compiled extensions (DeepSpeed's CPU Adam and its like) are kept, and locks left behind
there.

torch guards each extension's folder by a file `lock` and waits for it without end and without a word. A
process killed during a build leaves the file, and every later run hangs. Two environments that share one
folder rebuild at every start, so each environment gets its own. Nothing here is deleted: what to delete is
said. No torch.
"""

import os
import sys
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from dsmoe.base.errors import ConfigError

# Longest silence of a build that is alive: one source file compiled on a loaded machine (measured: 50-190 s
# an op).
QUIET_SECONDS = 300.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class StaleLock:
    """A lock file whose build is dead: its path and for how many seconds its folder has been silent."""

    path: Path
    quiet_seconds: float

    def advice(self) -> str:
        quiet = f"silent for {self.quiet_seconds:.0f} s"
        return f"{self.path} was left by a build that died ({quiet}); delete it: rm {self.path}"


def use_own_folder(environ: MutableMapping[str, str]) -> Path:
    """The extension folder; sets TORCH_EXTENSIONS_DIR to this environment's own unless the user set it."""
    if "TORCH_EXTENSIONS_DIR" not in environ:
        environ["TORCH_EXTENSIONS_DIR"] = str(folder(environ))
    return folder(environ)


def folder(environ: MutableMapping[str, str]) -> Path:
    """TORCH_EXTENSIONS_DIR, else a folder in this Python environment (the user's cache if read-only)."""
    if "TORCH_EXTENSIONS_DIR" in environ:
        return Path(environ["TORCH_EXTENSIONS_DIR"])
    if os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "torch_extensions"
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "torch_extensions" / sys.prefix.strip(os.sep).replace(os.sep, "-")


def stale_locks(cache: Path, quiet_seconds: float = QUIET_SECONDS) -> list[StaleLock]:
    """Locks in `cache` that no process of this host holds open and whose folder was silent for
    `quiet_seconds`.

    The silence stands for what cannot be seen: a builder on another host or of another user.
    """
    found = []
    for lock in sorted(cache.glob("*/lock")):
        quiet = _quiet_for(lock)
        if quiet is not None and quiet >= quiet_seconds and not _held_open(lock):
            found.append(StaleLock(lock, quiet))
    return found


def wait_until_loadable(
    cache: Path,
    extension: str,
    quiet_seconds: float = QUIET_SECONDS,
    on_wait: Callable[[str], None] | None = None,
) -> None:
    """Return once `extension` (its folder's name, such as "cpu_adam") is not locked; call it before loading
    one.

    A live build is waited for, told once through `on_wait`; a dead one's lock is a ConfigError that names the
    file.
    """
    lock = cache / extension / "lock"
    told = False
    while lock.exists():
        quiet = _quiet_for(lock)
        if quiet is not None and quiet >= quiet_seconds and not _held_open(lock):
            raise ConfigError(f"extension {extension} cannot be loaded: {StaleLock(lock, quiet).advice()}")
        if on_wait is not None and not told:
            on_wait(f"waiting for another process that builds extension {extension} ({lock})")
            told = True
        time.sleep(_POLL_SECONDS)


def _quiet_for(lock: Path) -> float | None:
    """Seconds since anything in the lock's folder changed; None when the lock has gone."""
    try:
        times = [lock.stat().st_mtime]
        for entry in lock.parent.iterdir():
            if entry.name != lock.name:
                times.append(entry.stat().st_mtime)
    except FileNotFoundError:
        return None if not lock.exists() else 0.0
    return max(0.0, time.time() - max(times))


def _held_open(lock: Path) -> bool:
    """Whether a process that we may look at has the lock open, as torch's builder has for the whole build."""
    target = os.path.realpath(lock)
    for table in Path("/proc").glob("[0-9]*/fd"):
        try:
            for descriptor in table.iterdir():
                if os.readlink(descriptor) == target:
                    return True
        except OSError:
            continue
    return False
