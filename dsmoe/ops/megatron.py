"""Megatron-core's permutation as an implementation of ours: on request only (`prefer`), never the default.

Lives here: what of Megatron-core 0.16 gives the same results through our signatures. Not here, because it does not:
its routing (ties go to any of the equal experts, a selection bias works with the sigmoid only, and it keeps no order of
choice), its grouped products (they need a GPU library that it does not bring), and the fused forms of these two
functions (they need Transformer Engine, and were never run by us). It is imported by the first use or check, which
takes seconds.
"""

import functools
import importlib.metadata
import warnings
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.base.errors import ConfigError
from dsmoe.ops.precision import maths_dtype
from dsmoe.ops.reference.rows import finish_sum

DEVICES = frozenset({"cpu", "cuda"})


@functools.cache
def installed() -> bool:
    """Whether the package is there, by its metadata; whether it also imports, `load` finds out."""
    try:
        importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def load() -> ModuleType:
    """Megatron-core's module of token functions; ConfigError when it does not import."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that Apex and Transformer Engine are missing
            from megatron.core.transformer.moe import moe_utils
    except Exception as error:  # a half-fitting package may raise anything
        raise ConfigError(
            f"megatron-core does not import ({type(error).__name__}: {error}); choose another implementation."
        ) from error
    return moe_utils


def gather_rows(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
    """See dsmoe.ops.gather_rows. Synchronises with the host once: Megatron-core takes a map of tokens by experts."""
    return _Permute.apply(x, order // position.shape[1])


def sum_rows(rows: Tensor, order: Tensor, position: Tensor, gates: Tensor | None = None, *rest: object) -> Tensor:
    """See dsmoe.ops.sum_rows. On a GPU with k > 2 the order of the sum is fixed only under
    torch.use_deterministic_algorithms."""
    wide = rows.to(maths_dtype(rows))
    if gates is not None:
        wide = wide * gates.flatten()[order][:, None]
    total = load().unpermute(wide, order // position.shape[1], torch.Size((position.shape[0], rows.shape[1])))
    return finish_sum(total, rows.dtype, *rest)


class _Permute(torch.autograd.Function):
    """permute with a gradient that is added in float32, which its own is not."""

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        ctx.shape = x.shape
        rows, _, _ = load().permute(x, _routing_map(token, x.shape[0]), num_out_tokens=len(token))
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (token,) = ctx.saved_tensors
        return load().unpermute(grad.to(maths_dtype(grad)), token, ctx.shape).to(grad.dtype), None


def _routing_map(token: Tensor, tokens: int) -> Tensor:
    """bool [N, C] that permute turns into these rows; token [R]: of each row.

    permute takes the columns one by one and in each the tokens upwards. Rows are sorted so by expert; where the token
    number does not rise a new column begins. Experts without rows, or whose tokens come after the last one's, need no
    column of their own.
    """
    if not len(token):
        return token.new_zeros((tokens, 1), dtype=torch.bool)
    column = torch.nn.functional.pad((token.diff() <= 0).cumsum(0), (1, 0))
    found = token.new_zeros((tokens, int(column[-1]) + 1), dtype=torch.bool)
    found[token, column] = True
    return found
