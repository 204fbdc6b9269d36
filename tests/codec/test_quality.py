"""PSNR against a loop in numpy."""

import math

import numpy as np
import pytest
import torch

from dsmoe.codec.identity import IdentityCodec
from dsmoe.codec.quality import psnr, reconstruction_psnr


def test_against_the_definition_on_unit_range() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 8, 8, generator=generator) * 2 - 1
    outputs = images + 0.3 * torch.randn(3, 3, 8, 8, generator=generator)
    got = psnr(images, outputs)
    for i in range(3):
        a = (images[i].numpy().astype(np.float64) + 1) / 2
        b = np.clip((outputs[i].numpy().astype(np.float64) + 1) / 2, 0, 1)
        assert float(got[i]) == pytest.approx(-10 * math.log10(((a - b) ** 2).mean()), abs=1e-4)


def test_known_values() -> None:
    black, white = -torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    assert float(psnr(black, white)) == pytest.approx(0.0, abs=1e-6)
    assert float(psnr(black, black + 0.2)) == pytest.approx(20.0, abs=1e-4)
    assert float(psnr(white, white + 5)) > 100  # clamped to the range of images


def test_batches_do_not_matter() -> None:
    class Off(IdentityCodec):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents * 0.9

    images = torch.rand(5, 3, 8, 8) * 2 - 1
    assert torch.equal(reconstruction_psnr(Off(), images, batch=2), reconstruction_psnr(Off(), images, batch=5))
    assert reconstruction_psnr(Off(), images).shape == (5,)
