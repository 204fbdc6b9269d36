"""Diffusion as mathematics: schedules, objectives, noise, samplers and guidance over plain tensors and callables.

No networks, no data, no random generators: noise and times are given by the caller, who draws them by
sample index. A "model" here is any callable (x [B,C,H,W], t [B] float) -> tensor, t in original step units of a
discrete schedule, or in (0, 1] of rectified flow.
"""

from dsmoe.diffusion.build import TrainingObjective, make_objective

__all__ = ["TrainingObjective", "make_objective"]
