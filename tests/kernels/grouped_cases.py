"""Rows sorted by expert, for the grouped products: in order or to be gathered, and products by one expert at a time."""

import torch
from torch import Tensor

BF16 = torch.bfloat16
NOWHERE = 2**30  # as a slot: whoever reads its token's row leaves this process's memory


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(BF16)


def routed(tokens: int, k: int, experts: int, padding: int = 0) -> dict[str, Tensor]:
    """order [tokens * k], of which the last `padding` rows belong to no expert and name a slot that is not there; ends,
    counts; the token of each row that is one. The first expert gets nothing when there are more than k."""
    chosen = torch.rand(tokens, experts)
    if experts > k:
        chosen[:, 0] = -1
    flat = chosen.topk(k).indices.flatten()
    order = flat.argsort(stable=True)
    rows = tokens * k - padding
    counts = flat[order[:rows]].bincount(minlength=experts)
    order[rows:] = NOWHERE
    return {"order": order, "ends": counts.cumsum(0).int(), "counts": counts, "token": order[:rows] // k}


def by_expert(rows: Tensor, weights: Tensor, counts: list[int] | Tensor, dtype: torch.dtype) -> Tensor:
    """Each expert's rows [.., D] times its matrix [F, D] transposed, in this dtype."""
    runs = rows[: int(sum(counts))].to(dtype).split([int(c) for c in counts])
    return torch.cat([run @ w.to(dtype).T for run, w in zip(runs, weights, strict=True)])


def scaled(act: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """act [rows, F] times gate [rows], as plain torch does it beside float32 gates."""
    if gate is None:
        return act
    wide = torch.promote_types(dtype, torch.float32)
    return (act.to(wide) * gate[: len(act), None].to(wide)).to(dtype)
