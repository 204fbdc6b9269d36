"""Which implementation serves an operation: by device type, printable, and overridable in tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dsmoe.base.errors import ConfigError, choose_from


class _Override:
    """The name given to use(). A plain attribute: torch.compile can trace and guard it, not a ContextVar."""

    name: str | None = None


_override = _Override()


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. `devices`: torch device types it serves, None for all."""

    name: str
    function: Callable
    devices: frozenset[str] | None = None

    def serves(self, device_type: str) -> bool:
        return self.devices is None or device_type in self.devices


@dataclass(frozen=True)
class Op:
    """An operation and its implementations, best first; all take and return the same tensors.

    A call goes by the device of its first argument.
    """

    name: str
    implementations: tuple[Implementation, ...]

    def __call__(self, x, *args, **kwargs):
        return self.choose(x.device.type).function(x, *args, **kwargs)

    def choose(self, device_type: str) -> Implementation:
        """The first implementation for the device, or the one use() names; ConfigError if there is none."""
        forced = _override.name
        for candidate in self.implementations:
            if forced in (None, candidate.name) and candidate.serves(device_type):
                return candidate
        kind = f"implementation of ops.{self.name} on {device_type}"
        raise ConfigError(choose_from(kind, forced, self.available(device_type)))

    def available(self, device_type: str) -> tuple[str, ...]:
        return tuple(i.name for i in self.implementations if i.serves(device_type))


@contextmanager
def use(name: str) -> Iterator[None]:
    """Within the context every op must run the implementation of this name (process-wide: for tests)."""
    before, _override.name = _override.name, name
    try:
        yield
    finally:
        _override.name = before
