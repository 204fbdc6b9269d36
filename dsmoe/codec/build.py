"""The one place that knows the codecs' names."""

from collections.abc import Callable
from pathlib import Path

from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.codec.identity import IdentityCodec
from dsmoe.codec.kl import KLCodec
from dsmoe.codec.protocol import Codec
from dsmoe.codec.sd import SDCodec
from dsmoe.codec.taesd import TaesdCodec

_CODECS: dict[str, Callable[[Path | str | None], Codec]] = {
    "kl-small": KLCodec,
    "taesd": TaesdCodec,
    "sd": SDCodec,
    "none": IdentityCodec,
}
NAMES = tuple(_CODECS)


def build(name: str, path: Path | str | None = None) -> Codec:
    """The codec `name` with frozen fp32 weights, on the CPU (move it with `.to(device)`).

    path: kl-small: a weights file (default: the committed one); taesd: the folder of its two files (required:
    no default); sd: a folder or hub id (default `sd.DEFAULT_MODEL`); none: must be None.
    Raises ConfigError for an unknown name or unusable path, CheckpointError for weights that do not fit.
    """
    if name not in _CODECS:
        raise ConfigError(choose_from("codec", name, NAMES))
    return _CODECS[name](path)
