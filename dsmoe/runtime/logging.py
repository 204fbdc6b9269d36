"""One logger, "dsmoe": rank 0 speaks on the console, every rank writes a file in the run folder. No torch.

Libraries log through the same handlers: all of it into the rank's file, only warnings on rank 0's console.
"""

import logging
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from dsmoe.base.errors import ConfigError

NAME = "dsmoe"
# Loggers that print through a handler of their own and do not propagate.
_SELF_HANDLED = ("DeepSpeed",)


def get_logger(part: str = "") -> logging.Logger:
    """The logger "dsmoe", or "dsmoe.<part>"."""
    return logging.getLogger(f"{NAME}.{part}" if part else NAME)


def configure(rank: int = 0, stream: TextIO | None = None) -> None:
    """Set up the console: rank 0 prints ours from INFO and others' from WARNING; other ranks print errors
    only.

    stream: stderr by default. May be called again; the last call counts.
    """
    root = logging.getLogger()
    _drop_handlers(root, _ConsoleHandler)
    root.addHandler(_ConsoleHandler(stream or sys.stderr, rank))
    # WARNING (the default) would drop our own INFO lines; libraries' loggers with a level of their own keep
    # it.
    if root.level in (logging.NOTSET, logging.WARNING):
        root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for name in _SELF_HANDLED:
        logger = logging.getLogger(name)
        if not any(isinstance(f, _ToRoot) for f in logger.filters):
            logger.addFilter(_ToRoot())


def attach_run_folder(path: Path, rank: int) -> Path:
    """From now on write every record to PATH/logs/rank00000.log (appended, one flush a line); returns the
    file.

    Raises ConfigError when the folder cannot be written.
    """
    file = Path(path) / "logs" / f"rank{rank:05d}.log"
    root = logging.getLogger()
    _drop_handlers(root, _RankFileHandler)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        root.addHandler(_RankFileHandler(file))
    except OSError as error:
        raise ConfigError(
            f"the run folder {path} cannot be written ({error.strerror}); choose another with --run."
        ) from error
    for name in _SELF_HANDLED:
        logging.getLogger(name).setLevel(logging.INFO)
    return file


class Progress:
    """Prints how far a long piece of work is: one log line an interval, with rate and time left, and one at
    the end.

    total: number of items, 0 when unknown. unit: what is counted. Lines only, so that logs of a batch job
    stay readable.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str = "items",
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.unit, self.interval = label, total, unit, interval
        self.done = 0
        self._clock = clock
        self._started = self._printed = clock()

    def update(self, count: int = 1) -> None:
        """Note that `count` more items are done."""
        self.done += count
        now = self._clock()
        if now - self._printed >= self.interval:
            self._printed = now
            get_logger().info("%s", self._line(now))

    def finish(self) -> None:
        """Print the closing line: how many, in what time, at what rate."""
        elapsed = self._clock() - self._started
        get_logger().info(
            "%s: %d %s in %s (%s)", self.label, self.done, self.unit, _duration(elapsed), self._rate(elapsed)
        )

    def _rate(self, elapsed: float) -> str:
        return f"{self.done / elapsed:.3g} {self.unit}/s" if elapsed > 0 else "rate unknown"

    def _line(self, now: float) -> str:
        elapsed = now - self._started
        if not self.total:
            return f"{self.label}: {self.done} {self.unit}, {self._rate(elapsed)}"
        left = f", {_duration(elapsed / self.done * (self.total - self.done))} left" if self.done else ""
        share = 100.0 * self.done / self.total
        return f"{self.label}: {self.done}/{self.total} {self.unit} ({share:.0f}%), {self._rate(elapsed)}{left}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def _drop_handlers(logger: logging.Logger, kind: type[logging.Handler]) -> None:
    for handler in [h for h in logger.handlers if isinstance(h, kind)]:
        logger.removeHandler(handler)
        handler.close()


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name == NAME or record.name.startswith(NAME + ".")


class _ConsoleHandler(logging.StreamHandler):
    """Short lines; which records pass depends on the rank and on whose they are."""

    def __init__(self, stream: TextIO, rank: int) -> None:
        super().__init__(stream)
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        if self.rank != 0:
            return record.levelno >= logging.ERROR
        if record.name == "py.warnings" and re.search(r"(Future|Deprecation)Warning:", record.getMessage()):
            return False
        return record.levelno >= (logging.INFO if _is_ours(record) else logging.WARNING)

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        where = "" if self.rank == 0 else f"[rank {self.rank}] "
        source = "" if _is_ours(record) else f"{record.name}: "
        level = f"{record.levelname} " if record.levelno >= logging.WARNING else ""
        return f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {where}{level}{source}{message}"


class _RankFileHandler(logging.FileHandler):
    """Full lines of one rank; opened for appending, so a resumed run continues the file."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))


class _ToRoot(logging.Filter):
    """Hands a self-handled logger's records to the root handlers instead of its own.

    A filter rather than a change of handlers, because it holds whether the library is imported before or
    after.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        logging.getLogger().handle(record)
        return False
