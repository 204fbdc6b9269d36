"""Weight files of codecs: reading safetensors, naming what does not fit, hashing. No network code here."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dsmoe.base.errors import CheckpointError

_SHOWN = 4  # names listed in one error line before it says "and N more"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; CheckpointError when it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"codec weights {path} do not exist; give the folder or file that holds them")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator)
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"codec weights {path} are damaged or no safetensors file: {error}") from error


def file_sha256(*paths: Path) -> str:
    """sha256 of the files' bytes one after another (what `cat FILES | sha256sum` prints)."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def tensor_sha256(state: dict[str, Tensor]) -> str:
    """sha256 over sorted (name, shape, fp32 bytes): the same for any file layout of the same weights."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key} {list(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def load_strict(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy `tensors` into `module` (fp32). One line names all missing, extra and misshapen keys."""
    expected = module.state_dict()
    complaints = []
    if missing := [key for key in expected if key not in tensors]:
        complaints.append(f"missing {_some(missing)}")
    if extra := [key for key in tensors if key not in expected]:
        complaints.append(f"unexpected {_some(extra)}")
    shapes = [
        f"{key} {list(tensors[key].shape)} (expected {list(expected[key].shape)})"
        for key in expected
        if key in tensors and tensors[key].shape != expected[key].shape
    ]
    if shapes:
        complaints.append(f"wrong shape {_some(shapes)}")
    if complaints:
        raise CheckpointError(f"{source} holds other weights than this codec needs: {'; '.join(complaints)}")
    module.load_state_dict({key: value.to(torch.float32) for key, value in tensors.items()})


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
