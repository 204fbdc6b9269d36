"""The run folder: where everything of one run lies, and who may write in it.

    plan.json  metrics.jsonl  tb/  samples/  ckpt/  logs/  lease.json  DONE | FAILED

The lease carries a generation number: a job that starts takes the next one, and a job that finds a later
generation than its own stops writing (a requeued run is never overwritten by its late predecessor).
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from dsmoe.base.errors import ConfigError, TrainingFailure
from dsmoe.base.plan import Plan
from dsmoe.base.recipe import science_of

DEFAULT_ROOT = Path("runs")


def write_text_atomically(path: Path, text: str) -> None:
    """Readers see the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
        """ConfigError if the folder cannot be used, or holds a run of other science; names the changed keys."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run folder {self.path} is a file; give --run a folder.")
        parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not os.access(parent, os.W_OK):
            raise ConfigError(f"run folder {self.path} cannot be written ({parent} is read-only); give another --run.")
        if not self.plan.exists():
            if self.path.is_dir() and any(self.path.iterdir()) and not self.holds_only_a_failure():
                raise ConfigError(
                    f"run folder {self.path} is not empty and holds no plan.json; give --run a new or empty folder."
                )
            return
        try:
            old = Plan.from_dict(json.loads(self.plan.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.plan} cannot be read ({error}); give another --run.") from error
        before, now = science_of(old.recipe), science_of(plan.recipe)
        changed = [f"{k} {before.get(k)!r} -> {now.get(k)!r}" for k in now if before.get(k) != now[k]]
        if changed:
            raise ConfigError(
                f"run folder {self.path} holds a run of other science ({'; '.join(changed)}); give another --run."
            )

    def holds_only_a_failure(self) -> bool:
        """Nothing but the traces of an earlier refused command."""
        return {p.name for p in self.path.iterdir()} <= {"FAILED", "logs", "lease.json"}

    def create(self, plan: Plan) -> "Lease":
        """Make the folder, write the plan, clear an old FAILED and take the next lease."""
        for folder in (self.path, self.tensorboard, self.samples, self.checkpoints, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        lease = Lease.take(self)
        self.failed.unlink(missing_ok=True)
        write_text_atomically(self.plan, json.dumps(plan.to_dict(), indent=1) + "\n")
        return lease

    def record_failure(self, line: str) -> None:
        """Leave the line in FAILED, unless the run is DONE; best effort, since the folder itself may be the fault."""
        try:
            if self.done.exists():
                return
            self.path.mkdir(parents=True, exist_ok=True)
            write_text_atomically(self.failed, line + "\n")
        except OSError:
            return

    def record_done(self, summary: dict) -> None:
        """The completion marker; schedulers should trust it rather than an exit code."""
        write_text_atomically(self.done, json.dumps(summary, indent=1) + "\n")


def default_run_folder(plan: Plan) -> RunFolder:
    """runs/<recipe>-<science hash>, so that the same command finds its run again."""
    return RunFolder(DEFAULT_ROOT / f"{plan.recipe.name}-{plan.science_hash}")


def rejected_run_folder(run: str | None, recipe: str) -> RunFolder:
    """Where FAILED goes when the input was refused: the named folder, or one beside it if it holds something else."""
    if run is None:
        return RunFolder(DEFAULT_ROOT / f"{Path(recipe).stem or 'recipe'}-rejected")
    folder = RunFolder(Path(run))
    if folder.path.is_dir() and any(folder.path.iterdir()) and not folder.holds_only_a_failure():
        return RunFolder(folder.path.with_name(folder.path.name + "-rejected"))
    return folder


@dataclass(frozen=True)
class Lease:
    """The right to write in a run folder: generation N until somebody takes N + 1."""

    folder: RunFolder
    generation: int

    @staticmethod
    def take(folder: RunFolder) -> "Lease":
        """Take the next generation."""
        generation = Lease._current(folder) + 1
        record = {"generation": generation, "pid": os.getpid(), "host": os.uname().nodename, "time": time.time()}
        write_text_atomically(folder.lease, json.dumps(record) + "\n")
        return Lease(folder, generation)

    @staticmethod
    def _current(folder: RunFolder) -> int:
        try:
            return int(json.loads(folder.lease.read_text(encoding="utf-8"))["generation"])
        except FileNotFoundError:
            return 0

    def verify(self) -> None:
        """TrainingFailure when a later job has taken over; call before every write that another job would see."""
        current = Lease._current(self.folder)
        if current != self.generation:
            raise TrainingFailure(
                f"run folder {self.folder.path} was taken over by a later job (lease {current}, ours "
                f"{self.generation}); this job stops without writing."
            )
