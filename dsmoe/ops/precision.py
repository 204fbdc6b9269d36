"""The one precision rule of every operation: which dtype its mathematics runs in."""

import torch
from torch import Tensor


def maths_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 tensors (tests), float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
