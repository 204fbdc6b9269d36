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
from dsmoe.checkpoint.stream import DTYPE_NAMES

# A mapped file's pages stay resident for as long as it is mapped: after so many bytes it is mapped anew.
MAPPED_BYTES = 64 << 20
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

Read = Callable[[str], Tensor]


class Source(Mapping[str, Tensor]):
    """Tensors by name, read from files when asked for.

    outline: a tensor on the meta device for every name. reader: opens the files and returns what reads a tensor by
    name; it is called again from time to time, so that what was mapped for earlier tensors is let go.
    """

    def __init__(self, outline: Mapping[str, Tensor], reader: Callable[[], Read]) -> None:
        self.outline = dict(outline)
        self._reader = reader
        self._read: Read | None = None
        self._given = 0

    def __getitem__(self, name: str) -> Tensor:
        facts = self.outline[name]
        if self._read is None or self._given > MAPPED_BYTES:
            self._read = None  # before the next mapping, not after it
            self._read, self._given = self._reader(), 0
        self._given += facts.nbytes
        return self._read(name)

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
        """Let go of what is mapped."""
        self._read = None


def derived(make: Callable[[Mapping[str, Tensor]], Mapping[str, Callable[[], Tensor]]], state: Source) -> Source:
    """The tensors that `make` says how to make from a mapping, made when asked for; the last one made is kept.

    The last, because what is cut into parts (a stack of experts) is asked for once a part.
    """
    outline = {name: one() for name, one in make(state.outline).items()}

    def reader() -> Read:
        ways, last = make(state), {}

        def read(name: str) -> Tensor:
            if name not in last:
                last.clear()
                last[name] = ways[name]()
            return last[name]

        return read

    return Source({name: meta(tuple(t.shape), t.dtype) for name, t in outline.items()}, reader)


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that has a shape and a dtype and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def outline(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The meta tensors of a mapping that holds real ones."""
    return {name: meta(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def safetensors_source(paths: list[Path]) -> tuple[Source, dict[str, str]]:
    """The tensors of safetensors files together, and the first file's metadata; CheckpointError of a bad one."""
    places: dict[str, Path] = {}
    found: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = metadata or file.metadata() or {}
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    facts = file.get_slice(name)
                    if name in places:
                        raise CheckpointError(f"{path} and {places[name]} both hold {name}; remove one of them.")
                    places[name] = path
                    found[name] = meta(tuple(facts.get_shape()), _dtype(path, name, facts.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or not safetensors ({error}); restore it from a copy.") from error

    def reader() -> Read:
        files: dict[Path, object] = {}

        def read(name: str) -> Tensor:
            path = places[name]
            if path not in files:
                files[path] = safe_open(path, framework="pt")
            return files[path].get_tensor(name)

        return read

    return Source(found, reader), metadata


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
