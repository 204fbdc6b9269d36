"""Which implementation serves an operation: by device type, printable, measured or preferred by name, overridable in
tests."""

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.ops import tuning


class _Selection:
    """What use() and prefer() were given. Plain attributes: torch.compile can trace and guard them, no ContextVar."""

    forced: str | None = None
    preferred: Mapping[str, str] = {}


_selection = _Selection()


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. devices: torch device types it serves, None for all.

    present: whether what it needs is installed; asked whenever a choice or a list comes to it, so it must be cheap.
    load: gets it ready, ConfigError when that fails; called when somebody prefers it, before anything runs.
    """

    name: str
    function: Callable
    devices: frozenset[str] | None = None
    present: Callable[[], bool] = lambda: True
    load: Callable[[], object] = lambda: None

    def serves(self, device_type: str) -> bool:
        return (self.devices is None or device_type in self.devices) and self.present()


@dataclass(frozen=True)
class Op:
    """An operation and its implementations, best first; all take and return the same tensors.

    A call goes by the device of its first argument. sizes: from a call's arguments to the sizes that a measurement
    depends on, as pairs of name and number; None where there is nothing to choose.
    """

    name: str
    implementations: tuple[Implementation, ...]
    sizes: Callable[..., tuple[tuple[str, int], ...]] | None = None

    def __call__(self, x, *args, **kwargs):
        tuned = None
        if self.sizes is not None and tuning.known(self.name):
            tuned = self.tuned(x.device, x.dtype, self.sizes(x, *args, **kwargs))
        return self.choose(x.device.type, tuned).function(x, *args, **kwargs)

    def tuned(self, device: torch.device, dtype: torch.dtype, sizes: tuple[tuple[str, int], ...]) -> str | None:
        """Name of the implementation measured best there (dsmoe.ops.tuning), None where nothing was measured.

        torch.compile makes a constant of every size: tokens for a bucket, widths as they are.
        """
        sizes = tuple([(name, operator.index(size)) for name, size in sizes])
        return tuning.choice(self.name, device.type, device.index or 0, dtype, sizes)

    def choose(self, device_type: str, tuned: str | None = None) -> Implementation:
        """The one that use() names; else, where they serve the device, the one that prefer() names, then `tuned`; else
        the first that does. ConfigError if there is none."""
        forced = _selection.forced
        if forced is not None:
            return self.named(forced, device_type)
        for wanted in (_selection.preferred.get(self.name), tuned):
            for candidate in self.implementations if wanted is not None else ():
                if candidate.name == wanted and candidate.serves(device_type):
                    return candidate
        for candidate in self.implementations:
            if candidate.serves(device_type):
                return candidate
        return self.named(None, device_type)

    def named(self, name: str | None, device_type: str) -> Implementation:
        """The implementation of that name; ConfigError with the choices where it does not serve the device."""
        for candidate in self.implementations:
            if candidate.name == name and candidate.serves(device_type):
                return candidate
        kind = f"implementation of ops.{self.name} on {device_type}"
        raise ConfigError(choose_from(kind, name, self.available(device_type)))

    def available(self, device_type: str) -> tuple[str, ...]:
        return tuple(i.name for i in self.implementations if i.serves(device_type))


@contextmanager
def use(name: str) -> Iterator[None]:
    """Within the context every op must run the implementation of this name (process-wide: for tests)."""
    before, _selection.forced = _selection.forced, name
    try:
        yield
    finally:
        _selection.forced = before


def set_preferred(preferences: Mapping[str, str]) -> None:
    """From now on in this process, op -> name of the implementation that comes before the default order."""
    _selection.preferred = dict(preferences)
