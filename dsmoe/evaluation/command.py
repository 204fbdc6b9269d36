"""How a command that judges or draws from finished weights starts, shares work among ranks, and ends.

Exit codes: the command's own; 2 the user's input was wrong (one line); 1 anything else. Not here: what is done.
"""

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dsmoe.base import files
from dsmoe.base.command_line import Parser
from dsmoe.base.errors import EXIT_BAD_INPUT, ConfigError, UserError
from dsmoe.runtime import distributed, logging
from dsmoe.runtime.device import Device
from dsmoe.runtime.distributed import LaunchPlace

EXIT_FAILED = 1
T = TypeVar("T")


def run(
    parser: Parser,
    argv: Sequence[str],
    work: Callable[[argparse.Namespace, Device], int],
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Parse, join the other ranks if a launcher started several, work(options, device), leave; the exit code."""
    place: LaunchPlace | None = None
    try:
        place = distributed.discover(environ)
        logging.configure(place.rank)
        options = parser.parse_args(argv)
    except UserError as error:
        return _refuse(error, (place.rank if place else distributed.stated_rank(environ)) == 0)
    try:
        device = Device.pick(place.local_rank)
    except UserError as error:
        return _refuse(error, True)  # a GPU may be missing for this rank alone
    try:
        if place.world_size > 1:
            distributed.initialize(place, device)
        code = work(options, device)
    except UserError as error:
        code = _refuse(error, place.rank == 0)
        distributed.shutdown(failed=True)
        return code
    except Exception as error:
        code = _failed(error, place.rank == 0)
        distributed.shutdown(failed=True)
        return code
    distributed.shutdown()
    return code


def _refuse(error: UserError, speaks: bool) -> int:
    if speaks:
        print(f"dsmoe: {error}", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT


def _failed(error: Exception, speaks: bool) -> int:
    """A path that the system refuses is the user's to mend; all else is told with its traceback by every rank."""
    if isinstance(error, OSError) and error.filename:
        return _refuse(ConfigError(f"cannot use {error.filename!r}: {error.strerror}; give another path."), speaks)
    logging.get_logger().error("%s", traceback.format_exc())
    logging.get_logger().error("dsmoe: %s", f"{type(error).__name__}: {error}".splitlines()[0])
    return EXIT_FAILED


def on_main_for_all(function: Callable[[], T]) -> T:
    """Rank 0 calls `function`; every rank returns its result (plain data) or raises its UserError.

    So no rank goes on to wait for one that has stopped, and all end with one exit code.
    """
    result, complaint = None, None
    if distributed.is_main():
        try:
            result = function()
        except UserError as error:
            complaint = str(error)
    result, complaint = distributed.broadcast_object([result, complaint])
    if complaint is not None:
        raise ConfigError(complaint)
    return result


def check_output(path: Path, option: str, suffix: str) -> None:
    """Make the folder of an output file; ConfigError when the file could not be written there."""
    if path.suffix != suffix:
        raise ConfigError(f"{option} is {str(path)!r}; its name must end in {suffix}.")
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder; give a file name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell: root passes them, and still cannot write on a read-only mount.
        with tempfile.TemporaryFile(dir=path.parent, prefix="."):
            pass
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written ({error.strerror}); give another.") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """base.files.whole_file for a user's own path: ConfigError when the disk refuses."""
    try:
        with files.whole_file(path) as temporary:
            yield temporary
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror or error}); give another place.") from error
