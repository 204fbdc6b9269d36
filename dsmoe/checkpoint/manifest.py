"""The files of one resumable checkpoint: their names, their JSON, and what proves them whole.

    images-000001234/  state.json  rank00000.json  rank00000.safetensors  rank00001.json ...

A shard (.safetensors) holds one rank's flat fp32 pieces; the .json of the same name says what they are.
`state.json` holds everything else, the size and SHA-256 of every other file, and a seal over itself.
Not here: writing shards (writer), gathering pieces (reader), which checkpoint counts (store).
"""

from dataclasses import dataclass

import torch

from dsmoe.base import sealed

FORMAT = 1
STATE_FILE = "state.json"


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


def unseal(text: str) -> dict:
    """What base.sealed.seal wrote; ValueError when a byte differs or the format is another."""
    return sealed.unseal(text, FORMAT)
