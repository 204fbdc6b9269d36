"""From class labels to images: guidance, sampler and decoder over any model callable, on one rank or on all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsmoe.base.diffusion import SPACING, settle_sampler
from dsmoe.base.plan import Plan
from dsmoe.codec.protocol import Codec
from dsmoe.data.transforms import to_uint8
from dsmoe.diffusion import TrainingObjective, make_objective
from dsmoe.diffusion.flow import RectifiedFlow
from dsmoe.diffusion.guidance import classifier_free
from dsmoe.diffusion.objective import Objective
from dsmoe.diffusion.samplers import Model as Denoiser
from dsmoe.diffusion.samplers import StepNoise, ancestral, ddim, euler
from dsmoe.ops import random
from dsmoe.runtime import distributed
from dsmoe.runtime.logging import Progress

Model = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, object]]
_STEP_BITS = 16  # room for the step number inside the sample index of a step's noise


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are drawn; sampler, spacing and eta must fit the objective (base.diffusion.check_sampler).

    steps: network evaluations an image (two each with guidance above 1). spacing, eta: of ddim. cfg_channels: 3
    (published DiT) or "all" (published DiT-MoE).
    seed: noise is drawn by (seed, image index), so an image does not depend on the batch it is drawn in.
    """

    sampler: str
    steps: int = 50
    spacing: str = SPACING
    eta: float = 0.0
    guidance: float = 4.0
    cfg_channels: int | str = 3
    seed: int = 0


def sampling_of(plan: Plan) -> Sampling:
    """The plan's own way of drawing, as its sample sheets use it."""
    report = plan.recipe.report
    return Sampling(
        sampler=settle_sampler(report.sampler, plan.recipe.diffusion),
        steps=report.sample_steps,
        spacing=report.spacing,
        eta=report.eta,
        guidance=report.guidance,
        cfg_channels=report.cfg_channels,
        seed=plan.recipe.train.seed,
    )


def draw_shared(
    model: Model,
    plan: Plan,
    codec: Codec,
    labels: Tensor,
    index: Tensor,
    sampling: Sampling,
    *,
    device: torch.device,
) -> Tensor:
    """uint8 [N, 3, H, W] on every rank's CPU; each rank draws every world_size-th image.

    model and codec are the plan's, on `device`. labels, index: int64 [N], N >= 1, class and number of each image,
    equal on all ranks. An image depends on its label and number alone, not on the ranks.
    """
    world, count = distributed.world_size(), len(labels)
    padded = torch.arange(-(-count // world) * world) % count  # equal shares, so that all ranks meet
    mine = padded[distributed.rank() :: world]
    progress = Progress("sampling", len(padded), "images")
    images = generate(
        model,
        codec,
        make_objective(plan.recipe.diffusion),
        labels[mine].to(device),
        index[mine].to(device),
        sampling,
        latent_side=plan.model.input_size,
        null_class=plan.model.num_classes,
        progress=lambda n: progress.update(n * world),
    )
    progress.finish()
    parts = distributed.all_gather_tensor(images)
    return torch.stack(parts, 1).flatten(0, 1)[:count]


@torch.no_grad()
def generate(
    model: Model,
    codec: Codec,
    objective: TrainingObjective,
    labels: Tensor,
    index: Tensor,
    sampling: Sampling,
    *,
    latent_side: int,
    null_class: int,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """uint8 images [N, 3, H, W] on the CPU for labels int64 [N]; index int64 [N] are the images' numbers.

    model: DiT or any callable (x [B,C,S,S], t [B], y [B]) -> (output, stats) on the device of `labels`.
    progress(n) is called after every finished batch of n images.
    """
    images = []
    for y, numbers in zip(labels.split(batch_size), index.split(batch_size), strict=True):
        shape = (codec.channels, latent_side, latent_side)
        start = random.normal(sampling.seed, "sample_noise", numbers, shape)
        guided = classifier_free(
            lambda x, t, labels: model(x, t, labels)[0], y, null_class, sampling.guidance, sampling.cfg_channels
        )
        noise = partial(_step_noise, sampling.seed, numbers, shape)
        latents = _WALKS[sampling.sampler](guided, start, objective, sampling, noise)
        images.append(to_uint8(codec.decode(latents)).cpu())
        if progress is not None:
            progress(len(y))
    return torch.cat(images)


def _step_noise(seed: int, numbers: Tensor, shape: Sequence[int], step: int) -> Tensor:
    return random.normal(seed, "sample_step", (numbers << _STEP_BITS) + step, shape)


def _ddim(model: Denoiser, start: Tensor, objective: Objective, sampling: Sampling, noise: StepNoise) -> Tensor:
    return ddim(
        model,
        start,
        objective.schedule,
        sampling.steps,
        sampling.spacing,
        eta=sampling.eta,
        noise=noise,
        prediction=objective.prediction,
    )


def _ancestral(model: Denoiser, start: Tensor, objective: Objective, sampling: Sampling, noise: StepNoise) -> Tensor:
    return ancestral(
        model,
        start,
        objective.schedule,
        str(sampling.steps),
        noise,
        prediction=objective.prediction,
        variance=objective.variance,
    )


def _euler(model: Denoiser, start: Tensor, flow: RectifiedFlow, sampling: Sampling, noise: StepNoise) -> Tensor:
    return euler(model, start, flow, sampling.steps)


_WALKS = {"ddim": _ddim, "ancestral": _ancestral, "euler": _euler}
