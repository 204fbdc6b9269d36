"""Latent autoencoders behind one protocol. `build(name, path)` makes one; see docs/codecs.md."""

from dsmoe.codec.build import NAMES, build
from dsmoe.codec.protocol import Codec, Posterior

__all__ = ["NAMES", "Codec", "Posterior", "build"]
