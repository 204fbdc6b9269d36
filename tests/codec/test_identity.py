"""The pixel-space codec."""

import pytest
import torch

from dsmoe.base.errors import ConfigError
from dsmoe.codec.identity import IdentityCodec


def test_images_pass_through_bit_for_bit() -> None:
    codec = IdentityCodec()
    images = torch.randn(2, 3, 5, 7)
    posterior = codec.encode(images)
    assert torch.equal(posterior.mean, images)
    assert not posterior.std.any()
    assert torch.equal(codec.decode(posterior.sample(torch.randn_like(images))), images)


def test_its_numbers() -> None:
    codec = IdentityCodec()
    assert (codec.channels, codec.factor, codec.scale, codec.image_multiple) == (3, 1, 1.0, 1)
    assert codec.provenance == {"name": "none", "sha256": "none", "scale": "1.0", "factor": "1"}


def test_a_path_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"weights\.bin"):
        IdentityCodec("weights.bin")
