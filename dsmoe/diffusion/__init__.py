"""Diffusion as mathematics: schedules, objectives, samplers and guidance over plain tensors and callables.

No networks, no data, no random generators: noise and timesteps are given by the caller, who draws them by
sample index. A "model" here is any callable (x [B,C,H,W], t [B] float in original step units) -> tensor.
"""
