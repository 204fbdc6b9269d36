"""Inputs of the operations under test."""

import torch

from dsmoe import ops


def random(*shape, dtype=torch.float32, seed=0):
    """Normal numbers on the default device, the same on each."""
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device(), dtype)


def routed(n, e, k):
    """Routing of n tokens to k of e experts."""
    return ops.route(random(n, 16, seed=1), random(e, 16, seed=2), k, False)
