"""Walking noise back to a sample: DDIM, DDPM-ancestral and Euler, as functions over a model callable.

Lives here: the three loops and their step arithmetic. Not here: which steps exist (schedules), the reverse
distribution (objective), guidance, and random numbers: the start x_T and every step's noise are given.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsmoe.base.errors import ConfigError
from dsmoe.diffusion.flow import RectifiedFlow
from dsmoe.diffusion.objective import Objective, check_prediction, invert, split_output
from dsmoe.diffusion.schedules import Schedule, iddpm_timesteps, respace, spaced_timesteps, work_dtype

Model = Callable[[Tensor, Tensor], Tensor]
StepNoise = Callable[[int], Tensor]
Progress = Callable[[int, int, Tensor], None]


@torch.no_grad()
def ddim(
    model: Model,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    spacing: str,
    *,
    eta: float = 0.0,
    noise: StepNoise | None = None,
    prediction: str = "epsilon",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    clip_sample: float | None = None,
    callback: Progress | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16) from x_T [B,C,...] to a sample of the same shape.

    model: gets (x [B,C,...] in fp32, or fp64 when x_T is; t [B] fp32 in original step units) and returns
    [B, C or 2C, ...] of any float dtype; variance channels are dropped. The result has the dtype of x.
    steps, spacing, steps_offset: see spaced_timesteps. Each step goes to the next entry of that list, whether
    or not steps divides T; the last to alpha_bar 1, or alpha_bar[0] without set_alpha_to_one (contracts 6).
    eta: 0 deterministic .. 1 ancestral variance. Above 0, noise(i) gives step i's normal noise [B,C,...];
    i = 0 is the first, noisiest step, and steps that add none do not ask.
    clip_sample: bound the x0 estimate to +-clip_sample; the noise estimate keeps its own value.
    callback(i, steps, x): called after each step. ConfigError: unknown names, or values out of range.
    """
    check_prediction(prediction)
    if not 0 <= eta <= 1:
        raise ConfigError(f"sampler eta is {eta}; it must be in 0..1.")
    if eta > 0 and noise is None:
        raise ConfigError(f"sampler eta is {eta} but no step noise was given; pass noise, or use eta 0.")
    visited = spaced_timesteps(len(schedule), steps, spacing, steps_offset)[::-1]
    alpha_bar = schedule.alpha_bar.tolist()
    told = schedule.timestep_map.tolist()
    last = 1.0 if set_alpha_to_one else alpha_bar[0]
    x = x_T.to(work_dtype(x_T))
    for i, t in enumerate(visited):
        now, after = alpha_bar[t], alpha_bar[visited[i + 1]] if i + 1 < steps else last
        output, _ = split_output(model(x, x.new_full((len(x),), told[t], dtype=torch.float32)), x.shape[1])
        output = output.to(x.dtype)
        inverse = invert(prediction, math.sqrt(now), math.sqrt(1 - now))
        x0 = inverse.x0_from_xt * x + inverse.x0_from_y * output
        direction = inverse.noise_from_xt * x + inverse.noise_from_y * output
        if clip_sample is not None:
            x0 = x0.clamp(-clip_sample, clip_sample)
        variance = eta**2 * (1 - after) / (1 - now) * (1 - now / after)
        x = math.sqrt(after) * x0 + math.sqrt(max(1 - after - variance, 0.0)) * direction
        if variance > 0:
            x = x + math.sqrt(variance) * noise(i).to(x)
        if callback is not None:
            callback(i, steps, x)
    return x


@torch.no_grad()
def ancestral(
    model: Model,
    x_T: Tensor,
    schedule: Schedule,
    respacing: str | Sequence[int] | None,
    noise_fn: StepNoise,
    *,
    prediction: str = "epsilon",
    variance: str = "learned_range",
    clip_x0: float | None = None,
    callback: Progress | None = None,
) -> Tensor:
    """DDPM ancestral sampling on a respaced schedule (Ho et al. 2020, algorithm 2; IDDPM section 4).

    respacing: IDDPM notation ("250", "ddim50", see iddpm_timesteps), increasing timesteps, or None for all.
    variance: as in Objective; "learned_range" needs 2C output channels.
    clip_x0: bound the x0 estimate to +-clip_x0; None as published for latents.
    noise_fn(i): step i's normal noise [B,C,...], i = 0 the noisiest; the last step adds none, never asks.
    model, dtypes, callback and errors: as in ddim.
    """
    if isinstance(respacing, str):
        respacing = iddpm_timesteps(len(schedule), respacing)
    if respacing is not None:
        schedule = respace(schedule, respacing)
    objective = Objective(schedule.to(x_T.device), prediction, variance)
    x = x_T.to(work_dtype(x_T))
    steps = len(schedule)
    for i in range(steps):
        t = torch.full((len(x),), steps - 1 - i, dtype=torch.int64, device=x.device)
        reverse = objective.reverse(model(x, objective.model_time(t)), x, t, clip_x0)
        x = reverse.mean
        if i + 1 < steps:
            x = x + (0.5 * reverse.log_variance).exp() * noise_fn(i).to(x)
        if callback is not None:
            callback(i, steps, x)
    return x


@torch.no_grad()
def euler(
    model: Model,
    x_1: Tensor,
    flow: RectifiedFlow,
    steps: int,
    *,
    callback: Progress | None = None,
) -> Tensor:
    """Euler's method on rectified flow from noise x_1 [B,C,...] at t = 1 to an image at t = 0 (contracts 2.2).

    steps equal strides: at t = 1, 1 - 1/steps, ..., 1/steps the network predicts the velocity v and x moves by
    -v / steps; published weights take 50. A second half of output channels is dropped.
    model, dtypes and callback: as in ddim, t by flow.model_time. ConfigError: fewer than 1 step.
    """
    if steps < 1:
        raise ConfigError(f"sampling steps is {steps}; it must be at least 1.")
    x = x_1.to(work_dtype(x_1))
    for i in range(steps):
        t = x.new_full((len(x),), (steps - i) / steps, dtype=torch.float32)
        prediction, _ = split_output(model(x, flow.model_time(t)), x.shape[1])
        x = x - flow.velocity(prediction).to(x.dtype) / steps
        if callback is not None:
            callback(i, steps, x)
    return x
