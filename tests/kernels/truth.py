"""How results are judged: against float64, allowed at most twice the error of plain torch in the same dtype."""

from collections.abc import Callable

import torch
from torch import Tensor

SCHEDULES = (0, 1, 2, 5)  # threads in order, reversed, one warp ahead of the others, shuffled
HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}  # of rounding to nearest


def error(result: Tensor, truth: Tensor) -> float:
    """Norm of the difference by norm of the truth."""
    if truth.numel() == 0:
        return 0.0
    scale = truth.double().norm().item()
    return (result.double() - truth.double()).norm().item() / (scale or 1.0)


def assert_close(name: str, result: Tensor, truth: Tensor, plain: Tensor) -> None:
    """result: ours; truth: float64; plain: torch in the same dtype.

    Where torch happens to be exact, one rounding of the exact result is allowed instead; with few values, where
    chance decides which of two equal methods comes closer, eight.
    """
    assert result.shape == truth.shape, (name, result.shape, truth.shape)
    assert not torch.isnan(result).any(), f"{name} has NaN"
    ours, theirs = error(result, truth), error(plain, truth)
    allowed = max(2 * theirs, HALF_UNIT[result.dtype] * (8 if truth.numel() < 100 else 1))
    assert ours <= allowed, f"{name}: error {ours:.2e}, plain torch {theirs:.2e}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bytes (NaN equals NaN)."""
    return a.dtype == b.dtype and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


def in_every_schedule(kernels, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of `run`, after they came out bitwise equal under several orders of threads and blocks."""
    first = None
    for schedule in SCHEDULES:
        kernels.library.configure(schedule)
        results = run()
        if first is None:
            first = results
        for name, value in results.items():
            assert same_bits(value, first[name]), f"{name} depends on the order of threads (schedule {schedule})"
    kernels.library.configure(0)
    return first
