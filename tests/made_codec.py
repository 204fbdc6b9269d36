"""An in-memory data set and a codec whose arithmetic is exact, for tests of latents."""

from dataclasses import dataclass, field

import numpy as np
from made_images import pixels
from torch import Tensor

from dsmoe.codec.protocol import Posterior, provenance

CLASSES = 3


class Noise:
    """Random 8x8 images by number, three classes in turn."""

    num_classes = CLASSES
    class_names = ("a", "b", "c")

    def __init__(self, size: int) -> None:
        self.size = size

    @property
    def fingerprint(self) -> str:
        return f"{self.size} of {'/'.join(self.class_names)}"

    def __len__(self) -> int:
        return self.size

    def read(self, i: int) -> tuple[np.ndarray, int]:
        return pixels(i, 8, 8), i % CLASSES


@dataclass
class Halving:
    """A codec whose result for an image cannot depend on its batch: even pixels are the mean, odd ones the std."""

    name: str = "halving"
    channels: int = 3
    factor: int = 2
    image_multiple: int = 2
    deterministic: bool = False
    encoded: int = 0
    batches: list[int] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=lambda: provenance("halving", "ab" * 32, 1.0, 2))

    def to(self, device: object) -> "Halving":
        return self

    def encode(self, images: Tensor) -> Posterior:
        self.encoded += len(images)
        self.batches.append(len(images))
        return Posterior(images[..., ::2, ::2].clone(), images[..., 1::2, 1::2].abs())
