"""Reads any range of any state out of a checkpoint, whatever layout wrote it.

Shards are memory-mapped: a rank reads the ranges it asks for and never holds the whole model.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dsmoe.base.errors import CheckpointError
from dsmoe.checkpoint.manifest import STATE_FILE, manifest_name, shard_name, unseal


def read_state(folder: Path) -> dict:
    """The sealed content of a checkpoint's state.json; CheckpointError when it is missing or damaged."""
    path = folder / STATE_FILE
    try:
        return unseal(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {folder} is damaged: {STATE_FILE} is missing.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {STATE_FILE}: {error}.") from error


@dataclass(frozen=True)
class _Stored:
    """Where a piece lies."""

    offset: int
    length: int
    shard: str
    key: str


class Reader:
    """The pieces of one checkpoint as whole states to read ranges of. Verify the checkpoint first (store)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = read_state(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[tuple[str, str], list[_Stored]] = defaultdict(list)
        self._files: dict[str, object] = {}
        for rank in range(self.state["ranks"]):
            self._index(rank)

    def _index(self, rank: int) -> None:
        try:
            manifest = json.loads((self.folder / manifest_name(rank)).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint {self.folder} is damaged: {manifest_name(rank)}: {error}.") from error
        for entry in manifest["pieces"]:
            self.shapes[entry["parameter"]] = tuple(entry["shape"])
            stored = _Stored(entry["offset"], entry["length"], shard_name(rank), entry["key"])
            self._stored[entry["kind"], entry["parameter"]].append(stored)

    @property
    def kinds(self) -> set[str]:
        """Which states it holds."""
        return {kind for kind, _ in self._stored}

    def fill(self, name: str, kind: str, shape: tuple[int, ...], offset: int, out: torch.Tensor) -> None:
        """Copy elements [offset, offset + out.numel()) of a parameter's state into `out` (flat, any device).

        CheckpointError when the parameter is unknown, has another shape, or part of the range is not stored.
        """
        if name not in self.shapes or self.shapes[name] != tuple(shape):
            raise CheckpointError(
                f"checkpoint {self.folder} holds {name} as {self.shapes.get(name, 'nothing')}, the model as "
                f"{tuple(shape)}; resume with the model that wrote it."
            )
        end, filled = offset + out.numel(), 0
        for stored in self._stored.get((kind, name), ()):
            low, high = max(offset, stored.offset), min(end, stored.offset + stored.length)
            if low < high:
                part = self._slice(stored, low - stored.offset, high - stored.offset)
                out.narrow(0, low - offset, high - low).copy_(part)
                filled += high - low
        if filled != out.numel():
            raise CheckpointError(
                f"checkpoint {self.folder} holds {filled} of the {out.numel()} elements of {kind} {name} from {offset}."
            )

    def whole(self, name: str, kind: str) -> torch.Tensor:
        """A parameter's whole state, fp32 in its shape, on the CPU."""
        shape = self.shapes[name]
        out = torch.empty(shape, dtype=torch.float32)
        self.fill(name, kind, shape, 0, out.view(-1))
        return out

    def _slice(self, stored: _Stored, low: int, high: int) -> torch.Tensor:
        try:
            if stored.shard not in self._files:
                self._files[stored.shard] = safe_open(self.folder / stored.shard, framework="pt")
            return self._files[stored.shard].get_slice(stored.key)[low:high]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"checkpoint {self.folder} is damaged: {stored.shard}: {error}.") from error
