"""What the network predicts and how it is scored: corruption, targets, reverse step distribution, loss.

Lives here: predictions on discrete schedules (epsilon, v, x0), reverse variances, the DiT training loss. Not here:
rectified flow (flow), drawing t and noise (the caller, by sample index), reduction over the batch and balance
losses (training), masks (tasks).
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.diffusion.schedules import Schedule, align, gather, work_dtype

Coefficient = Tensor | float

# (c, d) of the regression target c * x0 + d * noise, given a, s of x_t = a * x0 + s * noise.
_TARGETS: dict[str, Callable[[Coefficient, Coefficient], tuple[Coefficient, Coefficient]]] = {
    "epsilon": lambda a, s: (0.0, 1.0),
    "v": lambda a, s: (-s, a),  # Salimans & Ho 2022, appendix D
    "x0": lambda a, s: (1.0, 0.0),
}
PREDICTIONS = tuple(_TARGETS)
VARIANCES = ("learned_range", "fixed_small", "fixed_large")

_HALF_BIN = 1 / 255  # 256 grey levels over [-1, 1]
_EDGE = 0.999  # beyond it a value belongs to the outermost, open bin


class Inverse(NamedTuple):
    """x0 = x0_from_xt x_t + x0_from_y y and noise = noise_from_xt x_t + noise_from_y y, y the prediction."""

    x0_from_xt: Coefficient
    x0_from_y: Coefficient
    noise_from_xt: Coefficient
    noise_from_y: Coefficient


def invert(prediction: str, a: Coefficient, s: Coefficient) -> Inverse:
    """Solve x_t = a x0 + s noise, y = c x0 + d noise for (x0, noise); a, s floats or tensors, fp64."""
    c, d = _TARGETS[prediction](a, s)
    determinant = a * d - s * c
    return Inverse(d / determinant, -s / determinant, -c / determinant, a / determinant)


def check_prediction(prediction: str) -> None:
    """ConfigError unless the prediction type is known."""
    if prediction not in _TARGETS:
        raise ConfigError(choose_from("prediction", prediction, PREDICTIONS))


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """(prediction [B,C,...], variance channels [B,C,...] or None) of a network output of C or 2C channels."""
    if output.shape[1] == channels:
        return output, None
    if output.shape[1] == 2 * channels:
        return output[:, :channels], output[:, channels:]
    raise ConfigError(
        f"the model returned {output.shape[1]} channels for a state of {channels}; "
        f"it must return {channels}, or {2 * channels} with learned variance."
    )


class LossTerms(NamedTuple):
    """Per-sample loss [B] each: total = mse + vb; vb in bits per element (0 for a fixed variance)."""

    total: Tensor
    mse: Tensor
    vb: Tensor


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t) = N(mean, exp(log_variance)) and the x0 [B,C,...] it was derived from."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


@dataclass(frozen=True, eq=False)
class Objective:
    """A schedule, what the network predicts, and where the reverse variance comes from.

    prediction: "epsilon" (DDPM eq. 14), "v" = a noise - s x0, or "x0".
    variance: "learned_range": the network's second C channels interpolate from log beta_tilde (-1) to
    log beta (+1) (IDDPM eq. 15); "fixed_small": beta_tilde; "fixed_large": beta. With a fixed variance, extra
    output channels are ignored, so an 8-channel head stays usable. ConfigError on unknown names.
    Arithmetic is fp32 whatever the network's dtype, or fp64 when x0 / x_t is fp64.
    """

    schedule: Schedule
    prediction: str = "epsilon"
    variance: str = "learned_range"

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        if self.variance not in VARIANCES:
            raise ConfigError(choose_from("variance", self.variance, VARIANCES))

    def to(self, device: torch.device | str) -> "Objective":
        """The same objective with its tables on a device."""
        return dataclasses.replace(self, schedule=self.schedule.to(device))

    def describe(self) -> dict[str, str]:
        """What `--plan` prints of it."""
        alpha_bar = self.schedule.alpha_bar
        variance = "learned variance range" if self.variance == "learned_range" else "fixed variance"
        return {
            "objective": f"{self.prediction}, {variance}",
            "noise schedule": f"{self.schedule.name}, alpha_bar {alpha_bar[0]:.6g} .. {alpha_bar[-1]:.3g}",
        }

    def model_time(self, t: Tensor) -> Tensor:
        """The time [B] float32 a network is told for steps t [B]: original step units (contracts 2.1.3)."""
        return self.schedule.timestep_map[t].float()

    def corrupt(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise; x0, noise [B,C,...], t int64 [B]."""
        a, s = gather(self.schedule.signal, t, x0), gather(self.schedule.sigma, t, x0)
        return a * x0 + s * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should output for (x0, t, noise), shape of x0."""
        a, s = gather(self.schedule.signal, t, x0), gather(self.schedule.sigma, t, x0)
        c, d = _TARGETS[self.prediction](a, s)
        return c * x0.to(work_dtype(x0)) + d * noise.to(work_dtype(x0))

    def denoise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 a prediction [B,C,...] stands for at x_t, steps t [B]."""
        inverse = invert(self.prediction, self.schedule.signal[t], self.schedule.sigma[t])  # fp64, then cast
        from_xt, from_y = align(inverse.x0_from_xt, x_t), align(inverse.x0_from_y, x_t)
        return from_xt * x_t + from_y * prediction.to(from_y.dtype)

    def log_variance(self, raw: Tensor | None, x_t: Tensor, t: Tensor) -> Tensor:
        """log of the reverse variance: [B,C,...] from raw variance channels, or [B,1,...] when fixed."""
        small = gather(self.schedule.log_posterior_variance, t, x_t)
        large = gather(self.schedule.log_betas, t, x_t)
        if self.variance == "fixed_small":
            return small
        if self.variance == "fixed_large":
            # At t = 0 beta_0 would blur the last, discretised step: beta_tilde_1 stands in (IDDPM).
            return torch.where(align(t, x_t) == 0, small, large)
        if raw is None:
            raise ConfigError(
                "variance 'learned_range' needs a model with twice the state's channels; "
                "set learn_sigma, or a fixed variance ('fixed_small', 'fixed_large')."
            )
        fraction = (raw.to(work_dtype(x_t)) + 1) / 2
        return fraction * large + (1 - fraction) * small

    def reverse(self, output: Tensor, x_t: Tensor, t: Tensor, clip_x0: float | None = None) -> Reverse:
        """p(x_{t-1} | x_t) from a network output [B, C or 2C, ...] at x_t [B,C,...], steps t int64 [B].

        clip_x0: bound the estimate of x0 to [-clip_x0, clip_x0] first (None: do not, as for latents).
        """
        prediction, raw = split_output(output, x_t.shape[1])
        x0 = self.denoise(prediction, x_t, t)
        if clip_x0 is not None:
            x0 = x0.clamp(-clip_x0, clip_x0)
        return Reverse(self._posterior_mean(x0, x_t, t), self.log_variance(raw, x_t, t), x0)

    def _posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return gather(self.schedule.posterior_x0, t, x_t) * x0 + gather(self.schedule.posterior_xt, t, x_t) * x_t

    def training_loss(self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> LossTerms:
        """mean((y - y_hat)^2) + vb per sample, in fp32 (fp64 when x0 is); contracts 2.1.10.

        model_output [B, C or 2C, ...] of any float dtype; x0, x_t, noise [B,C,...]; t int64 [B].
        vb trains the variance channels alone: the mean it sees is detached.
        """
        prediction, raw = split_output(model_output, x0.shape[1])
        target = self.target(x0, t, noise)
        mse = (prediction.to(target.dtype) - target).square().flatten(1).mean(1)
        if self.variance != "learned_range":
            return LossTerms(mse, mse, torch.zeros_like(mse))
        vb = self._variational_bits(prediction.detach(), raw, x0, x_t, t)
        return LossTerms(mse + vb, mse, vb)

    def _variational_bits(self, prediction: Tensor, raw: Tensor | None, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """One term of the variational bound, [B], bits per element (DDPM eq. 5; IDDPM section 3.1)."""
        x0, x_t = x0.to(work_dtype(x0)), x_t.to(work_dtype(x0))
        x0_hat = self.denoise(prediction, x_t, t)
        log_variance = self.log_variance(raw, x_t, t)
        divergence = gaussian_kl(
            self._posterior_mean(x0, x_t, t),
            gather(self.schedule.log_posterior_variance, t, x_t),
            self._posterior_mean(x0_hat, x_t, t),
            log_variance,
        )
        first = align(t, x0) == 0
        # At t = 0 the mean is x0_hat. Other samples get a harmless mean, so their unused branch stays finite.
        nll = discretized_gaussian_nll(x0, torch.where(first, x0_hat, x0), log_variance)
        return torch.where(first, nll, divergence).flatten(1).mean(1) / math.log(2)


def gaussian_kl(mean_q: Tensor, log_var_q: Tensor, mean_p: Tensor, log_var_p: Tensor) -> Tensor:
    """KL(N(mean_q, e^log_var_q) || N(mean_p, e^log_var_p)) per element, in nats."""
    spread = (log_var_q - log_var_p).exp() + (mean_q - mean_p).square() * (-log_var_p).exp()
    return 0.5 * (log_var_p - log_var_q - 1 + spread)


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the mass N(mean, e^log_variance) puts on x's bin x +- 1/255, per element, in nats.

    Bins are those of 8-bit images in [-1, 1]; below -0.999 and above 0.999 they are open (DDPM eq. 13). The
    normal integral is exact and in log space, so far tails keep value and gradient; the published code takes
    a tanh fit of it and floors the mass at 1e-12.
    """
    inverse_std = (-0.5 * log_variance).exp()
    distance, half = (x - mean) * inverse_std, _HALF_BIN * inverse_std
    below = torch.special.log_ndtr(distance + half)
    above = torch.special.log_ndtr(half - distance)
    # By symmetry the bin is taken in the left tail, where log differences do not cancel.
    near = torch.special.log_ndtr(half - distance.abs())
    far = torch.special.log_ndtr(-half - distance.abs())
    gap = (near - far).clamp(min=torch.finfo(x.dtype).tiny)
    inside = near + torch.log(-torch.expm1(-gap))
    return -torch.where(x < -_EDGE, below, torch.where(x > _EDGE, above, inside))
