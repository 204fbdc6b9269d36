"""Compiled implementations, for CPU and GPU from one file (kernels/): dsmoe.ops's functions on `torch.ops.dsmoe`.

A call that the kernels do not cover (float64, float16 on a CPU, mixed dtypes, very wide rows on a GPU) runs the
reference.
"""

import platform

import torch
from torch import Tensor

from dsmoe.ops.native import ffn, glu, library
from dsmoe.ops.native.registration import register
from dsmoe.ops.reference import activation, modulation, routing, rows
from dsmoe.ops.reference import ffn as composed
from dsmoe.ops.reference.ffn import Matrices
from dsmoe.ops.reference.routing import Routing

LIBRARY = library.load()
if LIBRARY.loaded:
    register()
    glu.declare()
    ffn.declare()
# Device types that the kernels serve here.
DEVICES = frozenset(["cpu", *(["cuda"] if LIBRARY.archs else [])] if LIBRARY.loaded else [])
# The same of moe_ffn's variants that differ from what runs anyway: on a GPU that is "library".
VARIANTS = {ffn.LIBRARY: DEVICES & {"cpu"}, ffn.BLOCKS: DEVICES & {"cpu"}, ffn.GLU: DEVICES}

_CPU_DTYPES = (torch.float32, torch.bfloat16)
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# kernels/csrc/cuda/launchers.h
_GPU_EXPERTS, _GPU_CHOICES, _GPU_WIDTH, _GPU_MODULATED_WIDTH = 64, (1, 2, 4), 8192, 4096
_KINDS = {"swiglu": 0, "gelu": 1}


def _blocks_up_to(isa: str, machine: str) -> int:
    """The widest model for which "blocks" is the default on a CPU: measured with AVX2 (kernels/README.md), and not with
    other vectors."""
    return 128 if isa == "base" and machine in ("x86_64", "AMD64") else 0


_BLOCKS_UP_TO = _blocks_up_to(LIBRARY.isa, platform.machine())


def route(x: Tensor, weight: Tensor, k: int, renormalize: bool, bias: Tensor | None = None) -> Routing:
    """See dsmoe.ops.route."""
    covered = _covers(x, weight) and (x.device.type == "cpu" or (weight.shape[0] <= _GPU_EXPERTS and k in _GPU_CHOICES))
    if not covered or (bias is not None and bias.dtype != torch.float32):
        return routing.route(x, weight, k, renormalize, bias)
    probs, gates, indices, counts, ends, order, position, logsumexp, prob_sum = torch.ops.dsmoe.route(
        x, weight, k, renormalize, bias
    )
    return Routing(probs, gates, indices, counts, order, position, logsumexp, ends, prob_sum)


def gather_rows(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
    """See dsmoe.ops.gather_rows."""
    if not _covers(x):
        return rows.gather_rows(x, order, position)
    return torch.ops.dsmoe.gather_rows(x, order, position)


def sum_rows(
    given: Tensor,
    order: Tensor,
    position: Tensor,
    gates: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
    narrow: bool = False,
) -> Tensor:
    """See dsmoe.ops.sum_rows."""
    beside = [t for t in (add, residual, ada_gate) if t is not None]
    if not _covers(given, *beside) or (gates is not None and gates.dtype != torch.float32) or _too_wide(given):
        return rows.sum_rows(given, order, position, gates, add, residual, ada_gate, narrow)
    keep_branch = ada_gate is not None and ada_gate.requires_grad and torch.is_grad_enabled()
    return torch.ops.dsmoe.sum_rows(given, position, gates, add, residual, ada_gate, not narrow, keep_branch)[0]


def expert_act(
    h: Tensor,
    kind: str,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    counts: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """See dsmoe.ops.expert_act."""
    beside = [t for t in (up, bias) if t is not None]
    covered = _covers(h, *beside) and h.ndim == 2 and kind in _KINDS and (gate is None or gate.dtype == torch.float32)
    if not covered or _too_wide(h):
        return activation.expert_act(h, kind, up, bias, counts, gate)
    ends = None if counts is None else counts.cumsum(0, dtype=torch.int32)
    return torch.ops.dsmoe.expert_act(h, _KINDS[kind], up, bias, ends, gate)


def moe_ffn(
    x: Tensor,
    routing: Routing,
    weights: Matrices,
    kind: str,
    shared: Matrices | None = None,
    residual: Tensor | None = None,
    ada_gate: Tensor | None = None,
    recompute: bool = False,
    *,
    variant: str | None = None,
) -> Tensor:
    """See dsmoe.ops.moe_ffn. variant: of the products, see ffn; None for the default. Experts of "gelu" know the
    library's alone."""
    beside = [t for t in (*weights, *(shared or ()), residual, ada_gate) if t is not None]
    widest = max(x.shape[1], weights[0].shape[1], shared[0].shape[0] if shared else 0)
    covered = _covers(x, *beside) and routing.gates.dtype == torch.float32
    if not covered or (x.device.type != "cpu" and widest > _GPU_WIDTH):
        return composed.moe_ffn(x, routing, weights, kind, shared, residual, ada_gate, recompute)
    variant = (variant or _default_variant(x)) if kind == "swiglu" else ffn.LIBRARY
    return ffn.call(x, routing, weights, shared, _KINDS[kind], residual, ada_gate, recompute, variant)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """See dsmoe.ops.modulate."""
    if not _covers(x, shift, scale) or _too_wide(x, _GPU_MODULATED_WIDTH):
        return modulation.modulate(x, shift, scale)
    return torch.ops.dsmoe.modulate(x, shift, scale)[0]


def _default_variant(x: Tensor) -> str:
    return ffn.BLOCKS if x.device.type == "cpu" and x.shape[1] <= _BLOCKS_UP_TO else ffn.LIBRARY


def _covers(first: Tensor, *others: Tensor) -> bool:
    """One dtype, and one that the device's kernels know."""
    known = _CPU_DTYPES if first.device.type == "cpu" else _GPU_DTYPES
    return first.dtype in known and all(t.dtype == first.dtype for t in others)


def _too_wide(rows: Tensor, widest: int = _GPU_WIDTH) -> bool:
    return rows.device.type != "cpu" and rows.shape[-1] > widest
