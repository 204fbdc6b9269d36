"""torch's own files: read without running what is pickled in them, written without holding the model.

`torch.load(weights_only=True)` knows tensors and plain containers. Any other class in a file is refused by name, or,
where the caller says so, stands there as an inert object that holds nothing; code is never run in either case.
"""

import mmap
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dsmoe.base.errors import CheckpointError
from dsmoe.base.files import whole_file
from dsmoe.checkpoint.stream import tensor_bytes
from dsmoe.convert.source import Read, Source, outline

# What published training scripts put beside their tensors: a namespace of command-line arguments.
_HARMLESS = ("argparse.Namespace",)
_SHOWN = 4
_CRC_AT = 16  # in an entry of a zip directory


class Inert:
    """Stands for an object whose class is not known here: keeps its attributes and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update({key: value for key, value in state.items() if isinstance(key, str)})

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        """Nothing: a list subclass's elements are not wanted."""

    extend = append


def load(path: Path, *, inert: bool = False) -> object:
    """What torch.save wrote, memory-mapped where the file allows it (torch 1.6 and later write such).

    inert: put `Inert` objects where the file names classes beyond tensors and containers; without it CheckpointError
    names them. CheckpointError also for what is missing, damaged, or names a function that torch never lets through.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a file that torch.save wrote.")
    mapped = zipfile.is_zipfile(path)
    foreign = _foreign(path) if mapped else []
    refused = [name for name in foreign if name not in _HARMLESS]
    if refused and not inert:
        raise CheckpointError(_pickled_code(path, refused))
    stand_ins = [(type("Inert", (Inert,), {}), name) for name in foreign or _HARMLESS]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return _read(path, mapped)
    except CheckpointError:
        raise
    except Exception as error:  # the reader has many kinds for a damaged file
        name = re.search(r"(?:GLOBAL|global|function) ([\w.]+)", str(error))
        if name:
            raise CheckpointError(_pickled_code(path, [name[1]], never=inert)) from error
        raise CheckpointError(f"{path} is damaged or not a torch file; restore it from a copy.") from error


def _read(path: Path, mapped: bool) -> object:
    """torch.load; a file larger than memory is mapped as shared, since a private mapping must be backed by memory.

    Shared, what is written to a tensor would be written to the file: nothing here writes to what it has read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except RuntimeError as error:
        if not mapped or "unable to mmap" not in str(error):
            raise
    if not os.access(path, os.W_OK):
        raise CheckpointError(
            f"{path} is larger than this host's memory and write-protected; torch maps such files only when they may "
            "be written (they are not): allow it, for example on a copy."
        )
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _foreign(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or not a torch file ({type(error).__name__}: {error}).") from error


def _pickled_code(path: Path, names: list[str], never: bool = False) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    way = (
        "this one is never let through: take the weights out of it where it was made."
        if never
        else "save the tensors alone where it was made, or give --trust-pickle, with which such objects are read as "
        "inert stand-ins (their code is not run then, either)."
    )
    return f"{path} holds pickled code, not only tensors: {', '.join(names[:_SHOWN])}{more}. dsmoe runs none; {way}"


def pickled_source(path: Path, section: tuple[str, ...], *, inert: bool = False) -> Source:
    """The tensors of one mapping inside a torch file, found by its keys from the top."""

    def reader() -> Read:
        tree = load(path, inert=inert)
        for key in section:
            tree = tree[key]
        return tree.__getitem__

    tree = load(path, inert=inert)
    for key in section:
        tree = tree[key]
    return Source(outline(tree), reader)


def write_pickled(path: Path, facts: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """A flat dict of tensors as torch.save writes it, from tensors that come one by one.

    facts: meta tensors, in the order of the dict. torch writes the file without its data, whose places are then filled
    one tensor at a time; the skeleton takes address space for the model, but no memory. The file appears whole or not
    at all. Raises OSError.
    """
    skeleton = {name: torch.empty(tuple(fact.shape), dtype=fact.dtype) for name, fact in facts.items()}
    with whole_file(path) as temporary:
        try:
            with torch.serialization.skip_data():
                torch.save(skeleton, temporary)
        except RuntimeError as error:  # torch's own writer knows no other kind
            raise OSError(f"torch could not write it: {str(error).splitlines()[0]}") from error
        del skeleton
        with zipfile.ZipFile(temporary) as archive:
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            directory = archive.start_dir
        sums: dict[str, int] = {}
        with open(temporary, "r+b") as file:
            number = {name: n for n, name in enumerate(facts)}
            for name, tensor in tensors:
                fact, info = facts[name], entries[f"data/{number.pop(name)}"]
                assert (fact.shape, fact.nbytes) == (tensor.shape, info.file_size), (name, fact.shape, tensor.shape)
                content = tensor_bytes(tensor.to(fact.dtype))
                del tensor  # before the next one is made
                file.seek(_data_offset(file, info))
                file.write(content)
                sums[info.filename] = zlib.crc32(content)
                content.release()
                del content
            assert not number, list(number)
            _write_checksums(file, directory, sums)


def _data_offset(file, info: zipfile.ZipInfo) -> int:
    """Where an entry's data begins: after its local header (30 bytes), name and padding."""
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + name + extra


def _write_checksums(file, at: int, sums: Mapping[str, int]) -> None:
    """Put the data's CRC-32s where a zip reader looks for them (torch itself does not)."""
    while True:
        file.seek(at)
        head = file.read(46)
        if len(head) < 46 or not head.startswith(b"PK\x01\x02"):
            return
        name, extra, comment = struct.unpack("<HHH", head[28:34])
        found = file.read(name).decode()
        if found in sums:
            file.seek(at + _CRC_AT)
            file.write(struct.pack("<I", sums[found]))
        at += 46 + name + extra + comment
