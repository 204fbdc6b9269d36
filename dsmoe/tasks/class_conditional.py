"""Image generation from a class label: what one training sample is made of. Not here: the loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe.base.diffusion import DiffusionSpec
from dsmoe.codec.protocol import Posterior
from dsmoe.ops import random
from dsmoe.tasks.noising import Noising


@dataclass(frozen=True)
class TrainingInputs:
    """x0, noise: fp32 [B, C, h, w], clean scaled latents and the noise to mix in; t: [B] times as the objective
    counts them (Noising.times); y: int64 [B] classes, the null class where dropped."""

    x0: Tensor
    t: Tensor
    noise: Tensor
    y: Tensor


@dataclass(frozen=True, kw_only=True)
class ClassConditional:
    """All random parts of a training sample, each drawn by its sample index, so that no layout changes them.

    label_dropout: probability of training a sample without its label, for classifier-free guidance
    (contracts 2.1.7). diffusion: the recipe's, of which times and noise are drawn. Every `index` is int64 [B] sample
    indices, on the device where the result is wanted.
    """

    num_classes: int
    label_dropout: float
    seed: int
    diffusion: DiffusionSpec

    @property
    def null_class(self) -> int:
        """The label that says "no label"."""
        return self.num_classes

    def labels(self, y: Tensor, index: Tensor) -> Tensor:
        """y int64 [B] with the null class where the label is dropped."""
        dropped = random.uniform(self.seed, "label_drop", index, ()) < self.label_dropout
        return torch.where(dropped, self.null_class, y)

    def latents(self, posterior: Posterior, index: Tensor) -> Tensor:
        """One draw fp32 [B, C, h, w] from the codec's posterior (contracts 2.1.11)."""
        return posterior.sample(random.normal(self.seed, "posterior", index, posterior.mean.shape[1:]))

    def training_inputs(self, posterior: Posterior, labels: Tensor, index: Tensor) -> TrainingInputs:
        """Everything the loss needs of a micro-batch: posterior [B, C, h, w], labels and index int64 [B]."""
        noising = Noising(self.diffusion, self.seed)
        x0, t = self.latents(posterior, index), noising.times(index)
        return TrainingInputs(x0=x0, t=t, noise=noising.noise(index, x0.shape[1:], t), y=self.labels(labels, index))
