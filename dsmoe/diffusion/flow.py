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

    t_scale, flow_end: what the network is told and predicts, as in base.diffusion.DiffusionSpec. With flow_end
    "image" its time runs the other way and its output is x0 - noise: `velocity` turns that into v.
    Everywhere t is fp32 [B]. A network of 2C output channels is welcome: its second half, which published DiT-MoE
    weights have (learn_sigma), is dropped and there is no variational term. Arithmetic is fp32 whatever the
    network's dtype, or fp64 when x0 / x_t is fp64.
    """

    t_scale: float = 1.0
    flow_end: str = "noise"

    def to(self, device: torch.device | str) -> "RectifiedFlow":
        """Itself: there are no tables to move."""
        return self

    def describe(self) -> dict[str, str]:
        """What `--plan` prints of it."""
        told = "t in (0, 1]" if self.flow_end == "noise" else "1 - t in [0, 1), the image at 1"
        scaled = "" if self.t_scale == 1 else f", times {self.t_scale:g}"
        return {
            "objective": "velocity, mean squared error alone",
            "noise schedule": f"{FLOW}, the model is told {told}{scaled}",
        }

    def model_time(self, t: Tensor) -> Tensor:
        """The time [B] float32 a network is told: t itself in (0, 1], not times 1000 (contracts 2.2 and 6), unless
        the network has other conventions.

        The only place that knows: trainings and samplers both ask here.
        """
        told = t.float() if self.flow_end == "noise" else 1 - t.float()
        return told if self.t_scale == 1 else told * self.t_scale

    def velocity(self, prediction: Tensor) -> Tensor:
        """v = noise - x0 from what the network predicts, which with flow_end "image" is -v."""
        return prediction if self.flow_end == "noise" else -prediction

    def corrupt(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = (1 - t) x0 + t noise; x0, noise [B,C,...]."""
        at = align(t, x0)
        return (1 - at) * x0 + at * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should predict: v = noise - x0, the slope of x_t in t, the same at every t, or -v."""
        return self.velocity(noise.to(work_dtype(x0)) - x0.to(work_dtype(x0)))

    def denoise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 a prediction [B,C,...] stands for at x_t: x_t - t v."""
        at = align(t, x_t)
        return x_t - at * self.velocity(prediction.to(at.dtype))

    def training_loss(self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> LossTerms:
        """mean((v - v_hat)^2) per sample; model_output [B, C or 2C, ...] of any float dtype, vb is 0."""
        prediction, _ = split_output(model_output, x0.shape[1])
        target = self.target(x0, t, noise)
        mse = (prediction.to(target.dtype) - target).square().flatten(1).mean(1)
        return LossTerms(mse, mse, torch.zeros_like(mse))
