"""What a recipe may ask of diffusion: its names and the rules between them, so that a command is refused early.

Lives here: prediction, noise schedule, time density and noise of training; which sampler walks which schedule. Not
here: the mathematics, which is the room `diffusion`.
"""

import math
from dataclasses import dataclass

from dsmoe.base.errors import ConfigError, choose_from

PREDICTIONS = ("epsilon", "v", "x0", "velocity")
BETA_SCHEDULES = ("linear", "scaled_linear", "cosine")
FLOW = "rectified_flow"
TIME_DENSITIES = ("uniform", "logit_normal")
NOISES = ("gaussian", "multi_resolution")
FLOW_ENDS = ("noise", "image")
MOST_STEPS = 10000
STRENGTH = 0.9  # of multi-resolution noise, as published (contracts 4.5)

AUTO = "auto"
SAMPLERS = ("ddim", "ancestral", "euler")
SPACINGS = ("leading", "trailing", "linspace")
SPACING = "trailing"  # the default: the only one whose first step is the last timestep at any count


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(choose_from(key, value, allowed))


@dataclass(frozen=True, kw_only=True)
class DiffusionSpec:
    """Paper eq. 1-2: what the network predicts, how training images are noised, at which times.

    prediction: epsilon, v or x0 on the beta schedules, velocity on rectified_flow (contracts 2.2).
    learn_sigma: the network has a second half of output channels: the variance range of the beta schedules
    (contracts 2.1.10); on rectified_flow it is dropped, which keeps published DiT-MoE heads usable.
    timesteps: T of the beta schedules; rectified_flow's time is continuous in (0, 1].
    t_scale, flow_end: conventions of rectified_flow's network, so that weights of other codes are walked rightly: it
    is told t_scale * t (1 in DiT-MoE and SiT, 1000 in ProMoE; contracts 6), and t = 1 is `noise` (DiT-MoE: predicts
    noise - x0) or `image` (SiT: is told t_scale * (1 - t) of our t, predicts x0 - noise).
    time_density: uniform, or logit_normal, t = sigmoid(N(0, 1)), which DiT-MoE trains rectified_flow with.
    noise: gaussian, or multi_resolution of noise_strength times t/T (annealed, contracts 4.5).
    """

    prediction: str = "epsilon"
    learn_sigma: bool = True
    schedule: str = "linear"
    timesteps: int = 1000
    time_density: str = "uniform"
    noise: str = "gaussian"
    noise_strength: float = STRENGTH
    t_scale: float = 1.0
    flow_end: str = "noise"

    def __post_init__(self) -> None:
        _one_of("diffusion.prediction", self.prediction, PREDICTIONS)
        _one_of("diffusion.schedule", self.schedule, (*BETA_SCHEDULES, FLOW))
        _one_of("diffusion.time_density", self.time_density, TIME_DENSITIES)
        _one_of("diffusion.noise", self.noise, NOISES)
        _one_of("diffusion.flow_end", self.flow_end, FLOW_ENDS)
        if not 0 < self.t_scale < math.inf:
            raise ConfigError(f"diffusion.t_scale is {self.t_scale}; it must be above 0 (1, or 1000 as in ProMoE).")
        if not 2 <= self.timesteps <= MOST_STEPS:
            raise ConfigError(f"diffusion.timesteps is {self.timesteps}; it must be from 2 to {MOST_STEPS}.")
        if not 0 < self.noise_strength <= 1:
            raise ConfigError(f"diffusion.noise_strength is {self.noise_strength}; it must be in (0, 1].")
        if self.noise == "gaussian" and self.noise_strength != STRENGTH:
            raise ConfigError(
                f"diffusion.noise_strength is {self.noise_strength} but diffusion.noise is gaussian, which has none; "
                "set diffusion.noise=multi_resolution, or leave the strength out."
            )
        if self.is_flow:
            self._check_flow()
        else:
            self._check_steps()

    @property
    def is_flow(self) -> bool:
        """Whether time is continuous and the network predicts a velocity."""
        return self.schedule == FLOW

    @property
    def most_sample_steps(self) -> int:
        """How many steps a sampler may take: every timestep, or as many as anyone could want of continuous time."""
        return MOST_STEPS if self.is_flow else self.timesteps

    def _check_flow(self) -> None:
        if self.prediction != "velocity":
            raise ConfigError(
                f"diffusion.prediction is {self.prediction} but diffusion.schedule is {FLOW}; set "
                f"diffusion.prediction=velocity, or take a schedule of {', '.join(BETA_SCHEDULES)}."
            )
        if self.timesteps != DiffusionSpec.timesteps:
            raise ConfigError(
                f"diffusion.timesteps is {self.timesteps} but the time of {FLOW} is continuous; leave timesteps out."
            )

    def _check_steps(self) -> None:
        if self.prediction == "velocity":
            raise ConfigError(
                f"diffusion.prediction is velocity but diffusion.schedule is {self.schedule}; set "
                f"diffusion.schedule={FLOW}, or take prediction epsilon, v or x0."
            )
        if self.time_density != "uniform":
            raise ConfigError(
                f"diffusion.time_density is {self.time_density} but the steps of schedule {self.schedule} are drawn "
                f"uniformly; set diffusion.time_density=uniform, or diffusion.schedule={FLOW}."
            )
        if self.t_scale != 1 or self.flow_end != "noise":
            raise ConfigError(
                f"diffusion.t_scale is {self.t_scale:g} and diffusion.flow_end {self.flow_end} but diffusion.schedule "
                f"is {self.schedule}; both belong to {FLOW}: leave them out."
            )


def settle_sampler(sampler: str, spec: DiffusionSpec) -> str:
    """The sampler itself, or for "auto" the deterministic one of the schedule: euler on rectified_flow, else ddim."""
    if sampler == AUTO:
        return "euler" if spec.is_flow else "ddim"
    return sampler


def check_sampler(sampler: str, spacing: str, eta: float, spec: DiffusionSpec) -> None:
    """ConfigError unless the settled sampler walks this schedule and takes these options."""
    _one_of("sampler", sampler, SAMPLERS)
    _one_of("sampler spacing", spacing, SPACINGS)
    if spec.is_flow and sampler != "euler":
        raise ConfigError(f"sampler {sampler} walks discrete steps but diffusion.schedule is {FLOW}; take euler.")
    if sampler == "euler" and not spec.is_flow:
        raise ConfigError(
            f"sampler euler walks {FLOW} but diffusion.schedule is {spec.schedule}; take ddim (with eta 0 the same "
            "first-order step) or ancestral."
        )
    if not 0 <= eta <= 1:
        raise ConfigError(f"sampler eta is {eta}; it must be from 0 (deterministic) to 1.")
    if sampler != "ddim" and eta != 0:
        raise ConfigError(f"sampler eta is {eta} but sampler {sampler} takes none; leave eta out, or take ddim.")
    if sampler != "ddim" and spacing != SPACING:
        raise ConfigError(
            f"sampler spacing is {spacing} but sampler {sampler} takes none; leave spacing out, or take ddim."
        )
