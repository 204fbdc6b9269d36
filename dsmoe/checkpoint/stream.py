"""Writing a safetensors file tensor by tensor: the library's own writer wants the whole model in memory.

The format (version 0.x of its public description): eight bytes of header length, little-endian; a JSON header with
type, shape and byte range of every tensor; the bytes, in the order of the header.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from dsmoe.base.files import whole_file

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_ALIGNMENT = 8


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write `tensors`, which come in the order of `shapes`, one in memory at a time.

    dtypes: what each is stored as (of DTYPE_NAMES), fp32 where it says nothing. The file appears whole or not at all.
    Raises OSError (disk full, read-only).
    """
    stored = {name: (dtypes or {}).get(name, torch.float32) for name in shapes}
    assert sys.byteorder == "little", "safetensors files are little-endian"
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(_header(shapes, stored, metadata))
        expected = iter(shapes.items())
        for found, tensor in tensors:
            name, shape = next(expected, ("", ()))
            assert (name, shape) == (found, tuple(tensor.shape)), (name, shape, found, tuple(tensor.shape))
            file.write(tensor_bytes(tensor.to(stored[name])))
            del tensor  # before the next one is made: zip, and the name itself, would keep both
        assert not (left := [name for name, _ in expected]), left


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements in memory order, as files store them."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _header(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], metadata: Mapping[str, str]
) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + dtypes[name].itemsize * math.prod(shape)
        entries[name] = {"dtype": DTYPE_NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
