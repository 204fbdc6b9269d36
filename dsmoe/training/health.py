"""Non-finite losses and gradients, found on the rank and step where they arise."""

import torch

from dsmoe.base.errors import TrainingFailure


class GradientWatch:
    """Flags a non-finite gradient on this rank, by looking at the gradient of the token embedding.

    Every activation gradient flows down to the embedding, so one reduction a micro-step sees a fault anywhere in
    the backward pass before ZeRO averages the ranks and hides where it came from.
    """

    def __init__(self, embedding: torch.nn.Module, device: torch.device) -> None:
        self._bad = torch.zeros((), device=device)
        self._handle = embedding.register_forward_hook(self._attach)

    def _attach(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._look)

    def _look(self, gradient: torch.Tensor) -> None:
        self._bad = torch.maximum(self._bad, (~torch.isfinite(gradient).all()).float())

    def take(self) -> torch.Tensor:
        """1.0 if a non-finite gradient passed since the last call, else 0.0 (a device scalar)."""
        bad, self._bad = self._bad, torch.zeros_like(self._bad)
        return bad

    def close(self) -> None:
        """Remove the hook."""
        self._handle.remove()


def check_finite(step: int, losses: list[float], bad_gradients: list[float], norm: float, allow_overflow: bool) -> None:
    """TrainingFailure naming step and ranks when a loss or gradient is not finite.

    step: from 1, as the console counts. losses, bad_gradients: one entry a rank. allow_overflow: fp16 loss scaling
    skips such steps by itself.
    """
    bad = [rank for rank, loss in enumerate(losses) if loss != loss or abs(loss) == float("inf")]
    if bad:
        raise TrainingFailure(
            f"non-finite loss {losses[bad[0]]} at step {step} on rank {_ranks(bad)}; lower optimizer.lr, set "
            "optimizer.clip, or look at the data of that step."
        )
    if allow_overflow:
        return
    bad = [rank for rank, flag in enumerate(bad_gradients) if flag]
    if bad:
        raise TrainingFailure(
            f"non-finite gradient at step {step} on rank {_ranks(bad)}; lower optimizer.lr or set optimizer.clip."
        )
    if norm != norm or norm == float("inf"):
        raise TrainingFailure(
            f"non-finite gradient norm {norm} at step {step} (no single rank's backward showed it); lower "
            "optimizer.lr or set optimizer.clip."
        )


def _ranks(ranks: list[int]) -> str:
    return ", ".join(str(r) for r in ranks)
