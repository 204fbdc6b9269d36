"""The run folder: where everything of one run lies, and who may write in it.

    plan.json  metrics.jsonl  routing.jsonl  tb/  samples/  ckpt/  logs/  lease.json  DONE | FAILED

The lease carries a generation number: a job that starts takes the next one, and a job that finds a later
generation than its own stops writing (a requeued run is never overwritten by its late predecessor).
"""

import json
import os
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from dsmoe.base.errors import ConfigError, TrainingFailure, UserError
from dsmoe.base.files import write_whole
from dsmoe.base.plan import Plan
from dsmoe.base.recipe import science_of

DEFAULT_ROOT = Path("runs")
_TEMPORARY = ".dsmoe-tmp"
_UNFINISHED = (_TEMPORARY, ".tmp")  # ours: probes, and files that a killed job had not finished
_NAME_LENGTH = 100


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Creating the object touches nothing."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def routing(self) -> Path:
        return self.path / "routing.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tb"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.path / "ckpt"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def lease(self) -> Path:
        return self.path / "lease.json"

    @property
    def done(self) -> Path:
        return self.path / "DONE"

    @property
    def failed(self) -> Path:
        return self.path / "FAILED"

    def check(self, plan: Plan) -> None:
        """ConfigError if the folder cannot be used, or holds a run of other science; names the changed keys.

        Leaves nothing behind. Every rank asks, so that all stop together.
        """
        try:
            if os.path.lexists(self.path) and not self.path.is_dir():
                raise ConfigError(f"run folder {self.path} is a file; give --run a folder.")
            self._try_to_write()
            known = self.plan.exists()
            if not known and self.path.is_dir() and not self.holds_only_a_failure():
                raise ConfigError(
                    f"run folder {self.path} is not empty and holds no plan.json; give --run a new or empty folder."
                )
        except OSError as error:
            reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
            raise ConfigError(f"run folder {self.path} cannot be used ({reason}); give another --run.") from error
        if known:
            self._compare(plan)

    def _try_to_write(self) -> None:
        """OSError unless a file can be made here, or in the nearest folder above that exists.

        Permission bits do not tell: root passes them, and still cannot write in /proc or on a read-only mount.
        """
        path = self.path.absolute()
        nearest = next(p for p in (path, *path.parents) if p.exists() or p.is_symlink())
        try:
            with tempfile.TemporaryFile(dir=nearest, prefix=".", suffix=_TEMPORARY):
                pass
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(nearest)) from error

    def _compare(self, plan: Plan) -> None:
        try:
            old = Plan.from_dict(json.loads(self.plan.read_text(encoding="utf-8")))
        except (OSError, ValueError, UserError) as error:
            raise ConfigError(f"{self.plan} cannot be read ({error}); give another --run.") from error
        before, now = science_of(old.recipe), science_of(plan.recipe)
        changed = [f"{k} {before.get(k)!r} -> {now.get(k)!r}" for k in now if before.get(k) != now[k]]
        if changed:
            raise ConfigError(
                f"run folder {self.path} holds a run of other science ({'; '.join(changed)}); give another --run."
            )

    def holds_only_a_failure(self) -> bool:
        """Nothing, or nothing but the traces of an earlier refused command."""
        names = {p.name for p in self.path.iterdir() if not (p.name[0] == "." and p.name.endswith(_UNFINISHED))}
        return names <= {"FAILED", "logs", "lease.json"}

    def takes_a_failure(self) -> bool:
        """Whether FAILED can be written here without touching a run or another's files."""
        try:
            self._try_to_write()
            return not os.path.lexists(self.path) or self.holds_only_a_failure()
        except OSError:
            return False

    def create(self, plan: Plan) -> "Lease":
        """Make the folder, write the plan, clear an old FAILED and take the next lease."""
        self.path.mkdir(parents=True, exist_ok=True)
        lease = Lease.take(self)
        self.failed.unlink(missing_ok=True)
        # Before the folders: a job killed in between leaves something that its successor accepts.
        write_whole(self.plan, json.dumps(plan.to_dict(), indent=1) + "\n")
        for folder in (self.tensorboard, self.samples, self.checkpoints, self.logs):
            folder.mkdir(exist_ok=True)
        return lease

    def record_failure(self, line: str, *, replace: bool = True) -> None:
        """Leave the line in FAILED, unless the run is DONE; best effort, since the folder itself may be the fault.

        replace: False keeps a line that is there: of the rank that failed first, not of its peers that noticed.
        """
        try:
            if self.done.exists() or (self.failed.exists() and not replace):
                return
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.failed, line + "\n")
        except OSError:
            return

    def record_done(self, summary: dict) -> None:
        """The completion marker; schedulers should trust it rather than an exit code."""
        write_whole(self.done, json.dumps(summary, indent=1) + "\n")


def default_run_folder(plan: Plan) -> RunFolder:
    """runs/<recipe>-<science hash>, so that the same command finds its run again."""
    return RunFolder(DEFAULT_ROOT / f"{plan.recipe.name}-{plan.science_hash}")


def rejected_run_folder(run: str | None, recipe: str) -> RunFolder:
    """Where FAILED goes when the input was refused: a folder that takes it without touching anything else.

    The named one; one beside it when it holds something else; without either, runs/<recipe>-rejected.
    """
    if run:
        named = Path(os.path.abspath(run))
        beside = [named.with_name(f"{named.name}-rejected")] if named.name else []
        for folder in (RunFolder(path) for path in (named, *beside)):
            if folder.takes_a_failure():
                return folder
    return RunFolder(DEFAULT_ROOT / f"{Path(recipe).stem[:_NAME_LENGTH] or 'recipe'}-rejected")


@dataclass(frozen=True)
class Lease:
    """The right to write in a run folder: generation N until somebody takes N + 1.

    holder: a word of the job's own, which tells two jobs apart that took the same number at the same moment.
    """

    folder: RunFolder
    generation: int
    holder: str

    @staticmethod
    def take(folder: RunFolder) -> "Lease":
        """Take the next generation."""
        lease = Lease(folder, Lease._current(folder)[0] + 1, uuid.uuid4().hex)
        record = {"generation": lease.generation, "holder": lease.holder, "pid": os.getpid()}
        record |= {"host": os.uname().nodename, "time": time.time()}
        write_whole(folder.lease, json.dumps(record) + "\n")
        return lease

    @staticmethod
    def _current(folder: RunFolder) -> tuple[int, str]:
        try:
            record = json.loads(folder.lease.read_text(encoding="utf-8"))
            return int(record["generation"]), str(record["holder"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, ""  # none yet, or damaged: nobody holds it

    def is_current(self) -> bool:
        """Whether nobody has taken over."""
        return Lease._current(self.folder) == (self.generation, self.holder)

    def verify(self) -> None:
        """TrainingFailure when a later job has taken over; call before every write that another job would see."""
        if not self.is_current():
            current = Lease._current(self.folder)[0]
            raise TrainingFailure(
                f"run folder {self.folder.path} was taken over by a later job (lease {current}, ours "
                f"{self.generation}); this job stops without writing."
            )
