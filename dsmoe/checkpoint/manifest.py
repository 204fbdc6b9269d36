"""The files of one resumable checkpoint: their names, their JSON, and what proves them whole.

    images-000001234/  state.json  rank00000.json  rank00000.safetensors  rank00001.json ...

A shard (.safetensors) holds one rank's flat fp32 pieces; the .json of the same name says what they are.
`state.json` holds everything else, the size and SHA-256 of every other file, and a seal over itself.
Not here: writing shards (writer), gathering pieces (reader), which checkpoint counts (store).
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

FORMAT = 1
STATE_FILE = "state.json"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + tensor.numel()) of a flattened parameter-shaped state; tensor flat fp32.

    kind: `master`, `exp_avg`, `exp_avg_sq`, `ema`; name and shape are the whole parameter's.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    offset: int
    tensor: torch.Tensor

    @property
    def key(self) -> str:
        """Its tensor name in the shard."""
        return f"{self.kind}|{self.name}|{self.offset}"


def shard_name(rank: int) -> str:
    """File name of a rank's shard."""
    return f"rank{rank:05d}.safetensors"


def manifest_name(rank: int) -> str:
    """File name of the JSON beside a rank's shard."""
    return f"rank{rank:05d}.json"


def seal(content: dict) -> str:
    """JSON text that `unseal` reads back and in which any changed byte shows."""
    body = json.dumps(content, indent=1, sort_keys=True)
    return f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}\n"


def unseal(text: str) -> dict:
    """What was sealed; ValueError when a byte differs or the format is another."""
    digest, _, body = text.partition("\n")
    if not body.endswith("\n") or hashlib.sha256(body[:-1].encode()).hexdigest() != digest:
        raise ValueError("its seal does not fit its content")
    content = json.loads(body)
    if content.get("format") != FORMAT:
        raise ValueError(f"its format is {content.get('format')!r}, this dsmoe reads {FORMAT}")
    return content


def digest(path: Path) -> dict:
    """Size and SHA-256 of a file: {"bytes": int, "sha256": hex}. Raises OSError."""
    found, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": found.hexdigest()}


def difference(path: Path, stated: dict) -> str:
    """What is wrong with a file that should have this size and SHA-256; "" when nothing is."""
    try:
        size = path.stat().st_size
        if size != stated["bytes"]:
            return f"{path.name} has {size} bytes instead of {stated['bytes']}"
        return "" if digest(path)["sha256"] == stated["sha256"] else f"{path.name} differs from its SHA-256"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def sync_folder(path: Path) -> None:
    """Make names in a folder durable, so that a power cut does not undo a rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, text: str) -> None:
    """Write a small file and wait for the disk; not atomic by itself."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
