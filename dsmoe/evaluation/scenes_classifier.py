"""A small convolutional classifier of the embedded scenes, the judge of `class_agreement`: network, fit, file.

Not here: what is done with its verdicts.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dsmoe.base.errors import CheckpointError, ConfigError
from dsmoe.data.scenes import Scenes
from dsmoe.data.transforms import to_float

WEIGHTS = Path(__file__).parent / "weights" / "scenes_classifier.safetensors"
FORMAT = "dsmoe-scenes-classifier-1"
SIDE = 64  # images of any side are brought to this one first
TRAIN_SCENES = 16384
_WIDTHS = (32, 64, 128, 128)
_BATCH = 128
_PEAK_RATE, _WEIGHT_DECAY, _WARMUP = 4e-3, 0.05, 0.1


class ScenesClassifier(nn.Module):
    """Four strided convolutions, the mean over places and a linear layer: 0.25 million parameters."""

    def __init__(self, class_names: tuple[str, ...]) -> None:
        super().__init__()
        self.class_names = class_names
        layers: list[nn.Module] = []
        channels = 3
        for number, width in enumerate(_WIDTHS):
            side = 5 if number == 0 else 3
            layers += [
                nn.Conv2d(channels, width, side, stride=2, padding=side // 2, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, len(class_names))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """images float [B, 3, 64, 64] in [-1, 1] -> logits [B, classes]."""
        return self.head(self.features(images).mean((2, 3)))

    @torch.no_grad()
    def classify(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """uint8 [N, 3, H, W] of any side -> class numbers int64 [N], in evaluation mode."""
        was_training = self.training
        self.eval()
        found = [self(at_side(to_float(part))).argmax(1) for part in images.split(batch_size)]
        self.train(was_training)
        return torch.cat(found)


def at_side(images: Tensor) -> Tensor:
    """Float [B, 3, H, W] -> [B, 3, 64, 64], bilinear and without aliasing; the same object when nothing is to do."""
    if images.shape[-2:] == (SIDE, SIDE):
        return images
    return F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)


def render(split: str, count: int, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """The first `count` scenes of a split: uint8 [N, 3, side, side] and class numbers int64 [N]."""
    scenes = Scenes(split, side, count)
    read = [scenes.read(i) for i in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in read])).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([label for _, label in read])


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Training images [B, 3, 64, 64] flipped at random and worsened as a codec or a short training would.

    A quarter keeps its sharpness, a quarter is blurred, half goes through a coarser grid and back; then each image
    gets its own contrast, brightness and noise.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    count = len(images)
    flipped = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(flipped, images.flip(3), images)
    sharp, blurred, coarse, coarser = images.tensor_split(4)
    blurred = blur(blurred, float(uniform(0.4, 1.2)))
    coarse = _through_grid(coarse, int(uniform(32, 56)))
    coarser = _through_grid(coarser, int(uniform(20, 40)))
    images = torch.cat([sharp, blurred, coarse, coarser])
    images = images * uniform(0.8, 1.2, count, 1, 1, 1) + uniform(-0.1, 0.1, count, 1, 1, 1)
    return images + uniform(0.0, 0.1, count, 1, 1, 1) * torch.randn(images.shape, generator=generator)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, sigma in pixels."""
    reach = math.ceil(3 * sigma)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, weights, groups=3), weights.transpose(2, 3), groups=3)


def _through_grid(images: Tensor, side: int) -> Tensor:
    small = F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return at_side(small)


@dataclass(frozen=True)
class FitProgress:
    """One epoch done: its number of `epochs`, mean loss, share of the (worsened) training images found."""

    epoch: int
    epochs: int
    loss: float
    accuracy: float


def fit(
    images: Tensor,
    labels: Tensor,
    class_names: tuple[str, ...],
    *,
    epochs: int,
    seed: int = 0,
    report: Callable[[FitProgress], None] | None = None,
) -> ScenesClassifier:
    """A classifier trained on uint8 images [N, 3, 64, 64] with labels [N]; repeatable at one thread count.

    AdamW with a linear warm-up and a linear fall to zero, label smoothing 0.05, batches of 128, the last partial
    batch of an epoch dropped. ConfigError on fewer images than a batch.
    """
    steps = len(images) // _BATCH
    if steps == 0:
        raise ConfigError(f"{len(images)} training scenes do not fill one batch of {_BATCH}; give more.")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ScenesClassifier(class_names)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, weight_decay=_WEIGHT_DECAY)
    total = steps * epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / max(_WARMUP * total, 1.0), (total - n) / ((1 - _WARMUP) * total), 1.0)
    )
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        losses, right = 0.0, 0
        for chosen in order[: steps * _BATCH].split(_BATCH):
            batch = degrade(to_float(images[chosen]), generator).contiguous(memory_format=torch.channels_last)
            logits = model(batch)
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses += loss.item()
            right += int((logits.argmax(1) == labels[chosen]).sum())
        if report is not None:
            report(FitProgress(epoch + 1, epochs, losses / steps, right / (steps * _BATCH)))
    return model.eval().requires_grad_(False)


def save_classifier(path: Path, model: ScenesClassifier, notes: dict[str, str]) -> None:
    """Write whole or not at all; `notes` (how it was made, what it reaches) go into the metadata. Raises OSError."""
    metadata = {"format": FORMAT, "class_names": json.dumps(list(model.class_names)), **notes}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_classifier(path: Path = WEIGHTS) -> tuple[ScenesClassifier, dict[str, str]]:
    """(classifier ready to classify, metadata of its file); CheckpointError when missing, damaged or foreign."""
    if not path.is_file():
        raise CheckpointError(f"classifier {path} does not exist; make it with --train, or leave out --classifier.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"classifier {path} is damaged or not safetensors ({error}).") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"classifier {path} says format {metadata.get('format')!r}, expected {FORMAT!r}.")
    model = ScenesClassifier(tuple(json.loads(metadata["class_names"])))
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"classifier {path} does not fit this dsmoe ({error}).") from error
    return model.eval().requires_grad_(False), metadata
