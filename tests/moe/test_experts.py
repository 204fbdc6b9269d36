"""The experts' and shared expert's parameters at the start."""

import math

import pytest
import torch

from dsmoe.base.errors import ConfigError
from dsmoe.moe.experts import Experts
from dsmoe.moe.shared import SharedExpert


def check_xavier(matrix: torch.Tensor) -> None:
    """Uniform within sqrt(6 / (fan_in + fan_out)): bound, mean and variance within five standard errors."""
    bound = math.sqrt(6 / sum(matrix.shape))
    variance = bound**2 / 3
    assert 0.99 * bound < matrix.abs().max() <= bound
    assert abs(matrix.mean().item()) < 5 * math.sqrt(variance / matrix.numel())
    assert abs(matrix.var().item() - variance) < 5 * variance * math.sqrt(0.8 / matrix.numel())


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_each_expert_matrix_is_xavier_by_itself(kind):
    torch.manual_seed(0)
    experts = Experts(kind, 4, 32, 128)
    stacks = [experts.w1, experts.w2] + ([experts.w3] if kind == "swiglu" else [])
    for stack in stacks:
        for matrix in stack.detach():
            check_xavier(matrix)
        assert not torch.equal(stack[0], stack[1])
    if kind == "gelu":
        assert experts.w3.shape == (4, 1, 160)
        assert experts.w3.abs().max() == 0


def test_shared_expert_is_xavier_without_biases():
    torch.manual_seed(0)
    shared = SharedExpert(32, 64)
    assert len(list(shared.parameters())) == 3
    for p in shared.parameters():
        check_xavier(p.detach())


def test_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match=r"unknown model.expert_kind 'glu'"):
        Experts("glu", 2, 4, 4)
