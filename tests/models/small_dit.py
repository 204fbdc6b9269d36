"""Small models and inputs that the DiT tests share."""

import dataclasses

import torch

from dsmoe.base.presets import ModelSpec
from dsmoe.models.dit import DiT

DENSE = ModelSpec(depth=2, dim=24, heads=3, patch=2)
MOE = dataclasses.replace(DENSE, num_experts=4, top_k=2, shared_ratio=2.0)
GELU_MOE = dataclasses.replace(DENSE, num_experts=4, top_k=2, expert_kind="gelu", renormalize=True)
QK_NORM_MOE = dataclasses.replace(MOE, qk_norm=True)
SIDE, CHANNELS, CLASSES = 6, 3, 7


def build(spec, dtype=torch.float64, seed=0, scramble=True, **options):
    """A small model; `scramble` gives every parameter, the zero ones too, a random value."""
    torch.manual_seed(seed)
    arguments = {"input_size": SIDE, "in_channels": CHANNELS, "num_classes": CLASSES, "learn_sigma": True}
    model = DiT(spec, **(arguments | options)).to(dtype)
    if scramble:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, dtype=dtype))
    return model


def batch(count=3, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, CHANNELS, SIDE, SIDE, dtype=torch.float64, generator=generator).to(dtype)
    t = torch.randint(0, 1000, (count,), generator=generator)
    return x, t, torch.tensor([0, CLASSES, 3] * count)[:count]
