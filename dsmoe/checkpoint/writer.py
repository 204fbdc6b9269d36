"""Writes one rank's pieces as a shard and its manifest, hashing the bytes on their way to the disk.

The safetensors layout is written here (8-byte header length, JSON header, raw little-endian data), because the
library offers no way to hash what it writes without a second copy or a second reading.
"""

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import torch

from dsmoe.base.files import write_durably
from dsmoe.checkpoint.manifest import FORMAT, Piece, manifest_name, shard_name

_ALIGNMENT = 8


def write_shard(folder: Path, rank: int, pieces: Sequence[Piece]) -> None:
    """Write shard and manifest of `rank` and wait for the disk; pieces lie on the CPU. Raises OSError."""
    for piece in pieces:
        assert piece.tensor.dtype == torch.float32, (piece.key, piece.tensor.dtype)
        assert piece.tensor.dim() == 1, (piece.key, piece.tensor.shape)
        assert piece.tensor.is_contiguous(), piece.key
    header = _header(pieces)
    found, size = hashlib.sha256(), 0
    with open(folder / shard_name(rank), "wb", buffering=0) as file:
        for part in (header, *(_bytes(piece) for piece in pieces)):
            _write_all(file, part)
            found.update(part)
            size += len(part)
        os.fsync(file.fileno())
    manifest = {
        "format": FORMAT,
        "rank": rank,
        "file": {"name": shard_name(rank), "bytes": size, "sha256": found.hexdigest()},
        "pieces": [_entry(piece) for piece in pieces],
    }
    write_durably(folder / manifest_name(rank), json.dumps(manifest) + "\n")


def _header(pieces: Sequence[Piece]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for piece in pieces:
        end = start + 4 * piece.tensor.numel()
        assert piece.key not in table, f"two pieces are called {piece.key}"
        table[piece.key] = {"dtype": "F32", "shape": [piece.tensor.numel()], "data_offsets": [start, end]}
        start = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _entry(piece: Piece) -> dict:
    return {
        "key": piece.key,
        "kind": piece.kind,
        "parameter": piece.name,
        "shape": list(piece.shape),
        "offset": piece.offset,
        "length": piece.tensor.numel(),
        "dtype": "float32",
    }


def _bytes(piece: Piece) -> memoryview:
    return memoryview(piece.tensor.numpy()).cast("B")


def _write_all(file: object, part: bytes | memoryview) -> None:
    view = memoryview(part)
    while view:
        view = view[file.write(view) :]
