"""The errors a user can cause. Programmer mistakes stay assertions."""

import difflib
from collections.abc import Iterable

EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Something the user gave is wrong: one line that says what, the value, what is allowed, how to fix.

    Launchers print the line on rank 0 only, write it to RUN/FAILED and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class ConfigError(UserError):
    """A recipe, ds_config or override is malformed or contradicts another."""


class DataError(UserError):
    """A data folder or file cannot be used."""


class CheckpointError(UserError):
    """A checkpoint or weight file is missing, damaged or of another model."""


class TrainingFailure(Exception):
    """Training itself went wrong (non-finite loss or gradient): not an input mistake, exit code 1."""


def choose_from(kind: str, value: object, allowed: Iterable[object]) -> str:
    """Message for an unknown name: the value, close names if any, and everything allowed."""
    names = [str(a) for a in allowed]
    close = difflib.get_close_matches(str(value), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    return f"unknown {kind} {str(value)!r}.{hint} Choose from: {', '.join(names)}."
