"""Named tensors that lie in files and are read when asked for, one at a time, in bounded memory.

Here: the mapping, and safetensors files, one or several with an index. Not here: pickled files (pickled), DeepSpeed's
folders (deepspeed_folder), and which kind a path is (opening).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsmoe.base.errors import CheckpointError
from dsmoe.checkpoint.stream import DTYPE_NAMES, tensor_bytes

# A mapped torch file's pages stay resident for as long as it is mapped: after so many bytes it is mapped anew.
MAPPED_BYTES = 64 << 20
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

Read = Callable[[str], Tensor]


class Source(Mapping[str, Tensor]):
    """Tensors by name, read from files when asked for.

    outline: a tensor on the meta device for every name. reader: opens the files and returns what reads a tensor by
    name; it is called again from time to time, so that what was mapped for earlier tensors is let go. The last tensor
    read is kept, since what is cut into parts (a stack of experts) is asked for once a part. Never write to one.
    """

    def __init__(self, outline: Mapping[str, Tensor], reader: Callable[[], Read]) -> None:
        self.outline = dict(outline)
        self._reader = reader
        self._read: Read | None = None
        self._given = 0
        self._last: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._last:
            return self._last[name]
        facts = self.outline[name]
        self._last.clear()  # before the next is read, not after it
        if self._read is None or self._given > MAPPED_BYTES:
            self._read = None
            self._read, self._given = self._reader(), 0
        self._given += facts.nbytes
        self._last[name] = self._read(name)
        return self._last[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline)

    def __len__(self) -> int:
        return len(self.outline)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(facts.nbytes for facts in self.outline.values())

    def renamed(self, names: Mapping[str, str]) -> "Source":
        """The same tensors under other names; names: new -> old, and what is not there is left out."""
        return Source({new: self.outline[old] for new, old in names.items()}, lambda: lambda new: self[names[new]])

    def close(self) -> None:
        """Let go of what is mapped and kept."""
        self._read = None
        self._last.clear()


def derived(make: Callable[[Mapping[str, Tensor]], Mapping[str, Callable[[], Tensor]]], state: Source) -> Source:
    """The tensors that `make` says how to make from a mapping, made when asked for."""
    outline = {name: one() for name, one in make(state.outline).items()}

    def reader() -> Read:
        ways = make(state)
        return lambda name: ways[name]()

    return Source({name: meta(tuple(t.shape), t.dtype) for name, t in outline.items()}, reader)


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that has a shape and a dtype and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def outline(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The meta tensors of a mapping that holds real ones."""
    return {name: meta(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def safetensors_source(paths: list[Path]) -> tuple[Source, dict[str, str]]:
    """The tensors of safetensors files together, and the first file's metadata; CheckpointError of a bad one."""
    places: dict[str, tuple[Path, int]] = {}
    found: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        try:
            # The library checks the header; numpy's kind maps the file without asking for memory to back it.
            with safe_open(path, framework="np") as file:
                metadata = metadata or file.metadata() or {}
                names = list(file.keys())
            offsets, facts = _header(path)
            for name in names:
                if name in places:
                    raise CheckpointError(f"{path} and {places[name][0]} both hold {name}; remove one of them.")
                places[name] = path, offsets[name]
                found[name] = meta(tuple(facts[name]["shape"]), _dtype(path, name, facts[name]["dtype"]))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or not safetensors ({error}); restore it from a copy.") from error

    def read(name: str) -> Tensor:
        (path, offset), facts = places[name], found[name]
        tensor = torch.empty(facts.shape, dtype=facts.dtype)
        with open(path, "rb") as file:
            file.seek(offset)
            if file.readinto(tensor_bytes(tensor)) != facts.nbytes:
                raise CheckpointError(f"{path} ends within {name}; restore it from a copy.")
        return tensor

    return Source(found, lambda: read), metadata


def _header(path: Path) -> tuple[dict[str, int], dict[str, dict]]:
    """(where its data begin, header entry) of every tensor in a safetensors file (checkpoint.stream has the format)."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = {name: entry for name, entry in json.loads(file.read(size)).items() if name != "__metadata__"}
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in entries.items()}, entries


def _dtype(path: Path, name: str, stored: str) -> torch.dtype:
    if stored not in _DTYPES:
        raise CheckpointError(f"{path} holds {name} as {stored}; weights must be one of {', '.join(_DTYPES)}.")
    return _DTYPES[stored]


def shards_of(index: Path) -> list[Path]:
    """The files that a sharded model's index.json names, beside it; CheckpointError when one is missing."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files ({error}).") from error
    for path in paths:
        if path.resolve().parent != index.parent.resolve():
            raise CheckpointError(f"{index} names {path.name} outside its own folder; put the files together.")
        if not path.is_file():
            raise CheckpointError(f"{index} names {path.name}, which is missing; fetch it, too.")
    return paths
