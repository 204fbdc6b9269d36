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

_ALIGNMENT = 8


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write fp32 `tensors`, which come in the order of `shapes`, one in memory at a time.

    The file appears whole or not at all. Raises OSError (disk full, read-only).
    """
    assert sys.byteorder == "little", "safetensors files are little-endian"
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(_header(shapes, metadata))
        for (name, shape), (found, tensor) in zip(shapes.items(), tensors, strict=True):
            assert (name, shape) == (found, tuple(tensor.shape)), (name, shape, found, tuple(tensor.shape))
            file.write(tensor.detach().to(torch.float32).cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _header(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
