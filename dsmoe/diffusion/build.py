"""From a recipe's diffusion section to the objective that training and sampling share."""

from dsmoe.base.diffusion import DiffusionSpec
from dsmoe.diffusion.flow import RectifiedFlow
from dsmoe.diffusion.objective import Objective
from dsmoe.diffusion.schedules import make_schedule

TrainingObjective = Objective | RectifiedFlow


def make_objective(spec: DiffusionSpec) -> TrainingObjective:
    """The objective of a recipe, its tables on the CPU; ConfigError when timesteps are too few for the schedule."""
    if spec.is_flow:
        return RectifiedFlow(spec.t_scale, spec.flow_end)
    variance = "learned_range" if spec.learn_sigma else "fixed_small"
    return Objective(make_schedule(spec.schedule, spec.timesteps), spec.prediction, variance)
