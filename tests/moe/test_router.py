"""The gate's parameters."""

import math

import torch

from dsmoe.moe.router import Gate


def test_initial_weights_are_uniform_within_one_over_root_dim():
    torch.manual_seed(0)
    dim, experts = 1024, 16
    weight = Gate(dim, experts, 2, False).weight.detach()
    bound = 1 / math.sqrt(dim)
    assert weight.shape == (experts, dim)
    assert 0.999 * bound < weight.abs().max() <= bound
    # Standard error of a variance of a uniform: sqrt((mu4 - var^2) / n) = var * sqrt(0.8 / n).
    variance = bound**2 / 3
    assert abs(weight.var().item() - variance) < 5 * variance * math.sqrt(0.8 / weight.numel())
    assert abs(weight.mean().item()) < 5 * math.sqrt(variance / weight.numel())


def test_the_gate_routes_with_its_settings():
    gate = Gate(8, 4, 3, True)
    routing = gate(torch.randn(5, 8))
    assert routing.indices.shape == (5, 3)
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones(5))
