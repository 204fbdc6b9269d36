"""When a run saves, why it stops, and how it finds itself again.

What is saved is in state, how it reaches the disk in the checkpoint room.
"""

from dsmoe.base.plan import Plan
from dsmoe.checkpoint.choice import newest_whole
from dsmoe.checkpoint.reader import Reader
from dsmoe.checkpoint.saver import Saver
from dsmoe.checkpoint.store import Store
from dsmoe.runtime import distributed
from dsmoe.runtime.logging import get_logger
from dsmoe.runtime.stopping import StopRequest
from dsmoe.training import state
from dsmoe.training.ema import Ema
from dsmoe.training.engine import Engine
from dsmoe.training.telemetry import Telemetry


class Stopped(Exception):
    """The run was asked to stop, has saved itself, and goes on with the same command."""


def open_newest(store: Store) -> Reader | None:
    """The checkpoint to resume from, None at a first start; what earlier jobs left half-written goes first."""
    _remove_stale(store)
    distributed.barrier()
    return newest_whole(store)


@distributed.on_main
def _remove_stale(store: Store) -> None:
    for name in store.remove_stale():
        get_logger("checkpoint").info("removed unfinished %s", name)


class Checkpoints:
    """Saves a run at its intervals and when any rank is asked to stop; called by every rank at every step.

    Everything that has to be agreed on rides on the figures that a step exchanges (telemetry.FIELDS), so all ranks
    act on the same step, one after the signal or the end of the writing was noticed.
    """

    def __init__(
        self, plan: Plan, saver: Saver, stop: StopRequest, engine: Engine, ema: Ema, telemetry: Telemetry
    ) -> None:
        self._plan, self._saver, self._stop = plan, saver, stop
        self._engine, self._ema, self._telemetry = engine, ema, telemetry
        every, batch = plan.recipe.checkpoint.every, plan.recipe.train.global_batch
        self._every_steps = max(1, round(every / batch)) if every else 0

    def figures(self) -> tuple[float, float]:
        """This rank's `stop` and `saved` for the exchange of a step."""
        return float(self._stop.asked), float(self._saver.report())

    def after_step(self, step: int) -> None:
        """At the boundary after `step` steps: commit, save, or raise Stopped once the run is safe."""
        heard = self._telemetry.heard
        self._saver.advance([int(rank["saved"]) for rank in heard])
        if any(rank["stop"] for rank in heard):
            self._save(step)
            if not self._saver.finish():
                get_logger().error("stopping without a new checkpoint; the run resumes from the one before")
            raise Stopped
        if self._every_steps and step % self._every_steps == 0 and step < self._plan.recipe.train.steps:
            self._save(step)

    def close(self) -> None:
        """Wait for what is being written."""
        self._saver.finish()

    def _save(self, step: int) -> None:
        self._saver.finish()  # the disk is slower than the interval: one at a time
        self._telemetry.settle()
        plain = {
            "steps": step,
            "plan": self._plan.to_dict(),
            "telemetry": self._telemetry.position(),
            **state.plain_state(self._engine),
        }
        self._saver.begin(
            step * self._plan.recipe.train.global_batch,
            state.local_pieces(self._engine, self._ema),
            plain,
            state.total_bytes(self._plan.model.parameters, len(self._ema.averages)),
        )
