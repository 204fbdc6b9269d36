"""What was measured fastest for an operation: reads and writes tuning files, and answers dispatch from them.

An entry holds for one device by its maker's name, one dtype, one set of sizes (tokens in buckets of powers of two) and
the versions it was measured with: torch, CUDA, and the hash of the compiled operations' sources. Entries of other
versions are kept and not used. docs/tuning.md is for people; `python -m dsmoe tune` writes entries.

A process reads its file once, at the first call of an operation that can be tuned. Entries that ship with the package
(`tuning_defaults.json`) come behind the file's.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmoe.base.errors import ConfigError
from dsmoe.base.files import write_whole
from dsmoe.ops import native
from dsmoe.runtime.device import KINDS, Device
from dsmoe.runtime.logging import get_logger

FORMAT = 1
VARIABLE = "DSMOE_TUNING"
DEFAULTS = Path(__file__).with_name("tuning_defaults.json")
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Entry:
    """One finding. sizes: name -> size, tokens rounded up to a power of two; empty: of no shape in particular.

    choice: name of the implementation. measured: whether anybody timed it; what was not is shown, and never used.
    about: when, where and at which commit; or why it was not measured. versions: of `current_versions`; empty when not
    measured. ratios: implementation -> median of default / implementation over paired rounds, above 1 where faster than
    the default order's.
    """

    op: str
    device: str
    dtype: str
    sizes: dict[str, int]
    choice: str
    measured: bool
    about: str
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple:
        """What no two entries of a file share."""
        return (self.op, self.device, self.dtype, *sorted(self.sizes.items()), *sorted(self.versions.items()))


def bucket(count: int) -> int:
    """The smallest power of two that is not below count. A loop of comparisons, which torch.compile turns into a
    guard on the range where the count is symbolic."""
    size = 1
    while size < count:
        size *= 2
    return size


def current_versions() -> dict[str, str]:
    """torch, CUDA and kernels as an entry of now would name them."""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "kernels": native.LIBRARY.digest if native.LIBRARY.loaded else "none",
    }


def default_path() -> Path:
    """Where entries are written and looked for: DSMOE_TUNING, or tuning.json in the user's cache folder."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dsmoe" / "tuning.json"


def read(path: Path) -> list[Entry]:
    """The entries of a file; ConfigError in one line when it cannot be read or is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
        return _entries(content)
    except OSError as error:
        raise ConfigError(
            f"tuning file {path} cannot be read ({error.strerror}); correct {VARIABLE}, or make it with "
            "`python -m dsmoe tune`."
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"tuning file {path} is damaged ({error}); delete it and run `python -m dsmoe tune` again."
        ) from error


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Add entries to a file, in the place of those with the same key; it appears whole or stays as it was.

    ConfigError when what is there is damaged, or when it cannot be written.
    """
    kept = {entry.key: entry for entry in (read(path) if path.exists() else ())}
    kept |= {entry.key: entry for entry in entries}
    content = {"format": FORMAT, "entries": [dataclasses.asdict(kept[key]) for key in sorted(kept, key=repr)]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(
            f"tuning file {path} cannot be written ({error.strerror}); name another with --out."
        ) from error


def forget() -> None:
    """Read the files anew at the next call: after writing, and in tests. What torch.compile traced keeps its choice."""
    _table.cache_clear()
    device_name.cache_clear()


@torch.compiler.assume_constant_result
def known(op: str) -> bool:
    """Whether any entry in force here is about this operation."""
    return op in _table()


@torch.compiler.assume_constant_result
def choice(
    op: str, device_type: str, device_index: int, dtype: torch.dtype, sizes: tuple[tuple[str, int], ...]
) -> str | None:
    """Name of the implementation measured best, or None where nothing was measured.

    sizes: pairs as in Entry.sizes, tokens as a bucket. Constant while torch.compile traces.
    """
    found = _table().get(op)
    if found is None or device_type not in KINDS:
        return None
    return found.get((device_name(device_type, device_index), str(dtype), *sorted(sizes)))


@functools.cache
def device_name(kind: str, index: int) -> str:
    """The maker's name, which takes a moment to ask for."""
    return Device(kind, index).name


def describe(device: str) -> list[str]:
    """Lines for the doctor: which file, how many entries serve this device, how many do not and why; then each that
    changes what runs.

    device: the maker's name. Raises ConfigError for a damaged file.
    """
    path, now = default_path(), current_versions()
    stated = path.exists() or VARIABLE in os.environ
    lines = []
    for source, entries in ((path, read(path) if stated else None), ("shipped with the package", read(DEFAULTS))):
        if entries is None:
            lines.append(f"{path}: no such file; nothing was measured here (python -m dsmoe tune)")
            continue
        here = [e for e in entries if e.device == device]
        good = [e for e in here if e.measured and e.versions == now]
        stale = [e for e in here if e.measured and e.versions != now]
        line = f"{source}: {len(good)} entries in use for {device}, {len(entries) - len(here)} of other devices"
        if stale:
            line += f", {len(stale)} not used because measured with other versions ({_differences(stale[-1], now)})"
        untimed = {e.about for e in entries if not e.measured}
        lines.append(line + "".join(f"; some not measured: {about}" for about in sorted(untimed)))
        lines += [_described(entry) for entry in good if entry.ratios.get(entry.choice, 1.0) != 1.0]
    return lines


def _described(entry: Entry) -> str:
    sizes = " ".join(f"{name} {size}" for name, size in entry.sizes.items())
    dtype, speed = entry.dtype.removeprefix("torch."), entry.ratios[entry.choice]
    return f"{entry.op}, {dtype}, {sizes}: {entry.choice}, {speed:.2f} times as fast as the default ({entry.about})"


def _differences(entry: Entry, now: Mapping[str, str]) -> str:
    pairs = ((name, entry.versions.get(name), now[name]) for name in now)
    return ", ".join(f"{name} {theirs}, here {ours}" for name, theirs, ours in pairs if theirs != ours)


@functools.cache
def _table() -> dict[str, dict[tuple, str]]:
    """op -> (device, dtype, *sizes) -> choice, of the versions here; a file beats what was shipped."""
    found, now = list(read(DEFAULTS)), current_versions()
    path = default_path()
    if path.exists() or VARIABLE in os.environ:
        try:
            found += read(path)
        except ConfigError as error:
            get_logger("tuning").warning("%s Until then the default order of implementations runs.", error)
    table: dict[str, dict[tuple, str]] = {}
    for entry in found:
        if entry.measured and entry.versions == now:
            place = (entry.device, entry.dtype, *sorted(entry.sizes.items()))
            table.setdefault(entry.op, {})[place] = entry.choice
    return table


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key stands twice among {', '.join(name for name, _ in pairs)}")
    return found


def _entries(content: object) -> list[Entry]:
    if (
        not isinstance(content, dict)
        or set(content) != {"format", "entries"}
        or not isinstance(content["entries"], list)
    ):
        raise ValueError("it is not a mapping of `format` and a list `entries`")
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']!r}, this dsmoe reads {FORMAT}")
    entries = [_entry(number, given) for number, given in enumerate(content["entries"])]
    if len({e.key for e in entries}) != len(entries):
        raise ValueError("two of its entries are about the same")
    return entries


_KINDS = {"sizes": int, "versions": str, "ratios": float}


def _entry(number: int, given: object) -> Entry:
    fields = {f.name: f.type for f in dataclasses.fields(Entry)}
    if not isinstance(given, dict) or set(given) != set(fields):
        raise ValueError(f"entry {number} does not have exactly the keys {', '.join(fields)}")
    for name, value in given.items():
        kind = _KINDS.get(name)
        if kind is not None:
            good = isinstance(value, dict) and all(type(v) is kind for v in value.values())
        else:
            good = type(value) is fields[name]
        if not good:
            raise ValueError(f"entry {number}: {name} is {value!r}")
    entry = Entry(**given)
    if entry.measured != (set(entry.versions) == {"torch", "cuda", "kernels"}) or entry.measured != bool(entry.sizes):
        raise ValueError(f"entry {number}: measured is {entry.measured}, which its versions and sizes contradict")
    return entry
