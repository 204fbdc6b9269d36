"""The sizes of a call that decide which implementation is fastest, for dsmoe.ops.tuning: name and number.

Arguments are those that an implementation of the operation gets. `matrices`: of an expert, 3 for "swiglu", 2 for
"gelu". Counts of tokens and rows are rounded up to a power of two.
"""

from torch import Tensor

from dsmoe.ops.reference.ffn import Matrices
from dsmoe.ops.reference.routing import Routing
from dsmoe.ops.tuning import bucket

Pairs = tuple[tuple[str, int], ...]


def route(x: Tensor, weight: Tensor, k: int, *_: object) -> Pairs:
    """Tokens, their width, experts, choices."""
    return ("tokens", bucket(x.shape[0])), ("dim", x.shape[1]), ("experts", weight.shape[0]), ("k", k)


def gather_rows(x: Tensor, order: Tensor, position: Tensor) -> Pairs:
    """Tokens, their width, choices."""
    return ("tokens", bucket(x.shape[0])), ("dim", x.shape[1]), ("k", position.shape[1])


def sum_rows(rows: Tensor, order: Tensor, position: Tensor, *_: object) -> Pairs:
    """Tokens, their width, choices; whatever else is added in the same pass."""
    return ("tokens", bucket(position.shape[0])), ("dim", rows.shape[1]), ("k", position.shape[1])


def expert_act(h: Tensor, kind: str, *_: object) -> Pairs:
    """Rows, their width, the kind of expert."""
    return ("rows", bucket(h.shape[0])), ("hidden", h.shape[1]), ("matrices", _matrices(kind))


def modulate(x: Tensor, *_: object) -> Pairs:
    """Tokens of all images and their width."""
    return ("tokens", bucket(x.shape[0] * x.shape[1])), ("dim", x.shape[2])


def moe_ffn(
    x: Tensor, routing: Routing, weights: Matrices, kind: str, shared: Matrices | None = None, *_: object
) -> Pairs:
    """Tokens, D, F, the shared expert's F (0: none), experts, choices, the kind; with and without `recompute` alike."""
    experts, hidden, dim = weights[0].shape
    return (
        ("tokens", bucket(x.shape[0])),
        ("dim", dim),
        ("hidden", hidden),
        ("shared", shared[0].shape[0] if shared else 0),
        ("experts", experts),
        ("k", routing.indices.shape[1]),
        ("matrices", _matrices(kind)),
    )


def _matrices(kind: str) -> int:
    return 3 if kind == "swiglu" else 2
