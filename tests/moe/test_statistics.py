"""Summaries of the load: closed forms."""

import math

import torch

from dsmoe.moe import statistics


def test_entropy_imbalance_and_dead_experts():
    load = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0], [1.0, 0, 0, 0], [0.7, 0.2, 0.09, 0.01]])
    entropy = statistics.load_entropy(load)
    torch.testing.assert_close(entropy[:3], torch.tensor([1.0, 0.5, 0.0]))
    fourth = -sum(p * math.log(p) for p in (0.7, 0.2, 0.09, 0.01)) / math.log(4)
    assert math.isclose(entropy[3], fourth, rel_tol=1e-6)
    torch.testing.assert_close(statistics.load_imbalance(load), torch.tensor([1.0, 2.0, 4.0, 2.8]))
    dead = statistics.dead_experts(load)
    assert dead.nonzero().tolist() == [[1, 2], [1, 3], [2, 1], [2, 2], [2, 3], [3, 3]]
    assert statistics.dead_experts(load, share=0.5).sum(-1).tolist() == [0, 2, 3, 2]
