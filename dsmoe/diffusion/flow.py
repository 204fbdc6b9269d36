"""Rectified flow: a straight path from image to noise in continuous time, and the velocity along it.

Same verbs as `objective.Objective`, so that the training loop does not know which it holds. Not here: the Euler walk
back (samplers), drawing t and noise (the caller, by sample index).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe.base.diffusion import FLOW
from dsmoe.diffusion.objective import LossTerms, split_output
from dsmoe.diffusion.schedules import align, work_dtype


@dataclass(frozen=True)
class RectifiedFlow:
    """x_t = (1 - t) x0 + t noise for t in (0, 1]; the network predicts v = noise - x0 (contracts 2.2).

    Everywhere t is fp32 [B]. A network of 2C output channels is welcome: its second half, which published DiT-MoE
    weights have (learn_sigma), is dropped and there is no variational term. Arithmetic is fp32 whatever the
    network's dtype, or fp64 when x0 / x_t is fp64.
    """

    def to(self, device: torch.device | str) -> "RectifiedFlow":
        """Itself: there are no tables to move."""
        return self

    def describe(self) -> dict[str, str]:
        """What `--plan` prints of it."""
        return {
            "objective": "velocity, mean squared error alone",
            "noise schedule": f"{FLOW}, the model is told t in (0, 1]",
        }

    def model_time(self, t: Tensor) -> Tensor:
        """The time [B] float32 a network is told: t itself in (0, 1], not times 1000 (contracts 2.2 and 6).

        The only place that knows: trainings and samplers both ask here.
        """
        return t.float()

    def corrupt(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = (1 - t) x0 + t noise; x0, noise [B,C,...]."""
        at = align(t, x0)
        return (1 - at) * x0 + at * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v = noise - x0, the slope of x_t in t, the same at every t."""
        return noise.to(work_dtype(x0)) - x0.to(work_dtype(x0))

    def denoise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 a velocity [B,C,...] stands for at x_t: x_t - t v."""
        at = align(t, x_t)
        return x_t - at * prediction.to(at.dtype)

    def training_loss(self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> LossTerms:
        """mean((v - v_hat)^2) per sample; model_output [B, C or 2C, ...] of any float dtype, vb is 0."""
        prediction, _ = split_output(model_output, x0.shape[1])
        target = self.target(x0, t, noise)
        mse = (prediction.to(target.dtype) - target).square().flatten(1).mean(1)
        return LossTerms(mse, mse, torch.zeros_like(mse))
