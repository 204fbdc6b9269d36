"""Discrete noise schedules, the timesteps a sampler visits, and respacing.

Lives here: beta schedules and every table derived from them, in fp64. Not here: what a network predicts
(objective), how a sample is walked back (samplers), rectified flow, which has no tables (flow).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe.base.diffusion import SPACINGS
from dsmoe.base.errors import ConfigError, choose_from


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tables of a discrete diffusion x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise, t = 0..T-1.

    Every tensor is [T], fp64 but for timestep_map (int64); notation of Ho et al. 2020 (DDPM, section 2).
    timestep_map: the original step of each kept step, which is what a network is told (identity unless
        respaced).
    posterior_variance: beta_tilde_t of q(x_{t-1} | x_t, x0); entry 0 is exactly 0.
    log_posterior_variance: its logarithm, entry 0 replaced by entry 1 (contracts 2.1.10); a schedule of one
        step has no entry 1 and takes log beta_0.
    posterior_x0, posterior_xt: mean of that posterior = posterior_x0 * x0 + posterior_xt * x_t.
    """

    name: str
    timestep_map: Tensor
    betas: Tensor
    log_betas: Tensor
    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    signal: Tensor  # sqrt(alpha_bar)
    sigma: Tensor  # sqrt(1 - alpha_bar)
    posterior_variance: Tensor
    log_posterior_variance: Tensor
    posterior_x0: Tensor
    posterior_xt: Tensor

    def __len__(self) -> int:
        return self.betas.shape[0]

    def to(self, device: torch.device | str) -> "Schedule":
        """The same tables on a device (copied, never recomputed: the bits do not change)."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


def work_dtype(x: Tensor) -> torch.dtype:
    """The precision diffusion arithmetic runs in for state x: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def gather(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """Entries of a [T] table at integer steps t [B], in x's work precision, shaped [B,1,...] to meet x."""
    return align(table[t], x)


def align(values: Tensor, x: Tensor) -> Tensor:
    """One value a sample [B], in x's work precision, shaped [B,1,...] to meet x [B,...]."""
    return values.to(work_dtype(x)).view(-1, *[1] * (x.dim() - 1))


def _linear(timesteps: int) -> Tensor:
    # DDPM's end points at 1000 steps, scaled so that the total noise hardly depends on T (IDDPM code).
    scale = 1000 / timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)


def _scaled_linear(timesteps: int) -> Tensor:
    return torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), timesteps, dtype=torch.float64).square()


def _cosine(timesteps: int) -> Tensor:
    grid = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    level = torch.cos((grid + 0.008) / 1.008 * (math.pi / 2)).square()
    return (1 - level[1:] / level[:-1]).clamp(max=0.999)


_BETAS: dict[str, Callable[[int], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "cosine": _cosine,
}
SCHEDULES = tuple(_BETAS)


def make_schedule(name: str, timesteps: int = 1000) -> Schedule:
    """The named schedule over `timesteps` steps.

    "linear": betas 1e-4..0.02, times 1000/timesteps (DDPM, IDDPM). "scaled_linear": sqrt(beta) linear between
    the roots of 0.00085 and 0.012 (latent diffusion; not rescaled with timesteps). "cosine":
    squaredcos_cap_v2, betas at most 0.999 (IDDPM eq. 17). End points at 1000 steps: contracts section 6.
    ConfigError: unknown name, or a step count for which a beta leaves (0, 1).
    """
    if name not in _BETAS:
        raise ConfigError(choose_from("schedule", name, SCHEDULES))
    if timesteps < 1:
        raise ConfigError(f"schedule timesteps is {timesteps}; it must be at least 1.")
    betas = _BETAS[name](timesteps)
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise ConfigError(
            f"schedule {name!r} with {timesteps} timesteps has betas up to {betas.max():.3g}; "
            "they must stay inside (0, 1): use more timesteps."
        )
    return _derive(name, betas, torch.cumprod(1 - betas, 0), torch.arange(timesteps))


def _derive(name: str, betas: Tensor, alpha_bar: Tensor, timestep_map: Tensor) -> Schedule:
    alpha_bar_prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    posterior_variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
    first = posterior_variance[1:2] if len(betas) > 1 else betas[:1]
    return Schedule(
        name=name,
        timestep_map=timestep_map,
        betas=betas,
        log_betas=betas.log(),
        alpha_bar=alpha_bar,
        alpha_bar_prev=alpha_bar_prev,
        signal=alpha_bar.sqrt(),
        sigma=(1 - alpha_bar).sqrt(),
        posterior_variance=posterior_variance,
        log_posterior_variance=torch.cat([first, posterior_variance[1:]]).log(),
        posterior_x0=betas * alpha_bar_prev.sqrt() / (1 - alpha_bar),
        posterior_xt=(1 - alpha_bar_prev) * (alpha_bar / alpha_bar_prev).sqrt() / (1 - alpha_bar),
    )


def respace(schedule: Schedule, timesteps: Sequence[int]) -> Schedule:
    """The schedule that visits only `timesteps` (strictly increasing), with the same alpha_bar at each.

    betas are those of the longer strides, 1 - alpha_bar[t_i] / alpha_bar[t_{i-1}]; timestep_map keeps the
    original steps (IDDPM section 4). ConfigError: empty, unordered, repeated or outside the schedule.
    """
    steps = list(timesteps)
    ordered = all(low < high for low, high in itertools.pairwise(steps))
    if not steps or not ordered or steps[0] < 0 or steps[-1] >= len(schedule):
        raise ConfigError(
            f"timesteps {steps[:6]}{'...' if len(steps) > 6 else ''} cannot respace a schedule of "
            f"{len(schedule)} steps; give strictly increasing integers in 0..{len(schedule) - 1}."
        )
    kept = torch.tensor(steps, device=schedule.betas.device)
    alpha_bar = schedule.alpha_bar[kept]
    previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return _derive(schedule.name, 1 - alpha_bar / previous, alpha_bar, schedule.timestep_map[kept])


def iddpm_timesteps(total: int, respacing: str) -> tuple[int, ...]:
    """Increasing timesteps of the IDDPM notation, out of `total`; contracts 2.1.10.

    "250": 250 steps, first and last included, round(i * (total - 1) / 249). "10,15,20": that many from each
    equal section. "ddim50": the integer stride that gives exactly 50 steps from 0.
    ConfigError: not of this notation, or more steps than there are.
    """
    if respacing.startswith("ddim"):
        return _integer_stride(total, respacing)
    parts = respacing.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"respacing {respacing!r} is not understood; give a count ('250'), counts by section "
            "('10,15,20') or an integer stride ('ddim50')."
        )
    steps: list[int] = []
    base, extra = divmod(total, len(parts))
    start = 0
    for section, count in enumerate(int(part) for part in parts):
        size = base + (section < extra)
        if count > size:
            raise ConfigError(
                f"respacing {respacing!r} asks for {count} steps in a section of {size} "
                f"(of {total} in all); ask for at most {size}."
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Summed, not multiplied, as published: at exact halves (never at 250 or 50 of 1000) they round apart.
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += size
    return tuple(steps)


def _integer_stride(total: int, respacing: str) -> tuple[int, ...]:
    digits = respacing.removeprefix("ddim")
    count = int(digits) if digits.isdecimal() else 0
    for stride in range(1, total + 1):
        steps = range(0, total, stride)
        if len(steps) == count:
            return tuple(steps)
    raise ConfigError(
        f"respacing {respacing!r}: no integer stride over {total} steps gives {digits!r} steps; "
        "use a divisor of the total, or the plain count for a fractional stride."
    )


def spaced_timesteps(total: int, steps: int, spacing: str, steps_offset: int = 0) -> tuple[int, ...]:
    """Increasing timesteps a few-step sampler visits, out of `total` (Lin et al. 2024, table 2).

    "leading": i * (total // steps) + steps_offset, i = 0..steps-1.
    "trailing": round(total - i * total / steps) - 1, which always has the last step.
    "linspace": round(i * (total - 1) / (steps - 1)), which has both ends (one step: step 0 alone).
    Exact halves round to even (diffusers leaves them to float rounding). steps_offset is for "leading" only.
    ConfigError: unknown spacing, steps outside 1..total, or an offset that leaves the schedule.
    """
    if spacing not in SPACINGS:
        raise ConfigError(choose_from("timestep spacing", spacing, SPACINGS))
    if not 1 <= steps <= total:
        raise ConfigError(f"sampling steps is {steps}; a schedule of {total} steps allows 1..{total}.")
    if steps_offset and spacing != "leading":
        raise ConfigError(f"steps_offset is {steps_offset} with spacing {spacing!r}; only 'leading' takes one.")
    if spacing == "leading":
        chosen = [i * (total // steps) + steps_offset for i in range(steps)]
        if chosen[0] < 0 or chosen[-1] >= total:
            raise ConfigError(
                f"steps_offset {steps_offset} puts {steps} leading steps at {chosen[0]}..{chosen[-1]}; "
                f"they must lie in 0..{total - 1}."
            )
        return tuple(chosen)
    if spacing == "trailing":
        return tuple(round(total - i * total / steps) - 1 for i in reversed(range(steps)))
    return tuple(round(i * (total - 1) / max(steps - 1, 1)) for i in range(steps))
