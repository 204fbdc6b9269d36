"""Open files of a data set that is used by several processes: each opens its own, the least recently used is closed.

Not here: what is read from them.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from dsmoe.base.errors import DataError

_T = TypeVar("_T")


class OpenFiles(Generic[_T]):
    """At most `limit` things by number, made by open_one(number) and ended by close_one(thing).

    Nothing that is open is pickled, and a forked child opens anew, so that no two processes share a handle.
    """

    def __init__(self, limit: int, open_one: Callable[[int], _T], close_one: Callable[[_T], None]) -> None:
        self._limit, self._open_one, self._close_one = limit, open_one, close_one
        self._open: OrderedDict[int, _T] = OrderedDict()
        self._process = os.getpid()

    def __getitem__(self, number: int) -> _T:
        if self._process != os.getpid():  # the parent's; it closes them
            self._open, self._process = OrderedDict(), os.getpid()
        if number not in self._open:
            self._open[number] = self._open_one(number)
            if len(self._open) > self._limit:
                self._close_one(self._open.popitem(last=False)[1])
        self._open.move_to_end(number)
        return self._open[number]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}

    def __del__(self) -> None:
        if self._process == os.getpid():
            for thing in self._open.values():
                self._close_one(thing)


def unreadable(path: object, error: OSError) -> DataError:
    """A disk or mount that fails: it must stop the run, not shift it to other images as damage does."""
    return DataError(f"cannot read {str(path)!r}: {error.strerror}; check the disk, the mount and the permissions.")
