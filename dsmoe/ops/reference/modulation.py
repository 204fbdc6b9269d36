"""Adaptive layer norm."""

from torch import Tensor
from torch.nn import functional as F

from dsmoe.ops.precision import maths_dtype

LAYER_NORM_EPS = 1e-6  # contracts 2.1.1


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """See dsmoe.ops.modulate."""
    dtype = maths_dtype(x)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=LAYER_NORM_EPS)
    return (normed * (1 + scale.to(dtype)[:, None]) + shift.to(dtype)[:, None]).to(x.dtype)
