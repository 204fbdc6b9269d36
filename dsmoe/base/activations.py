"""Bytes that autograd keeps of a forward pass, and what a backward pass needs beside them, by arithmetic (no torch).

Counted from what the modules of `models` and `moe` and the operations save, the reference ones or, with `compiled`, the
compiled ones (which keep less): a test holds every formula against torch's own saved tensors. Letters: R = images x
tokens, D dim, F hidden units, k experts a token. Weights are not counted here, nor is anything of a few bytes an image.
"""

from dsmoe.base.accounting import TIMESTEP_DIM
from dsmoe.base.presets import ModelSpec

FLOAT, INDEX = 4, 8


def saved_by_block(spec: ModelSpec, *, images: int, tokens: int, itemsize: int, compiled: bool = False) -> int:
    """Bytes one block keeps from its forward to its backward pass; itemsize: bytes of a stored element (fp32 4)."""
    rows, dim = images * tokens, spec.dim
    stream = itemsize * rows * dim
    # adaLN: silu(c), and the six chunks of its layer's output, alive through the gates.
    modulation = itemsize * images * dim * 7
    # qkv's input, q|k|v, attention's output (also proj's input) and the gated branch; logsumexp of every head.
    attention = 6 * stream + FLOAT * rows * spec.heads
    if spec.qk_norm:  # both norms' outputs and statistics; then attention's output also comes in another layout
        attention += 3 * stream + 2 * 2 * itemsize * rows * spec.heads
    if not spec.is_moe:
        feed_forward = _saved_by_mlp(spec, rows, itemsize)
    else:
        feed_forward = (_saved_by_compiled_moe if compiled else _saved_by_moe)(spec, images, rows, itemsize)
    modulate = stream + 2 * FLOAT * rows if compiled else _saved_by_modulate(rows, dim, images)
    return modulation + attention + feed_forward + 2 * modulate


def saved_outside_blocks(
    spec: ModelSpec, *, images: int, tokens: int, channels: int, out_channels: int, itemsize: int
) -> int:
    """Bytes that embedders, final layer and their shared conditioning vector keep."""
    rows, dim, pixels = images * tokens, spec.dim, images * tokens * spec.patch**2
    timestep = itemsize * images * (TIMESTEP_DIM + 2 * dim)
    # The conditioning vector, its silu and the two chunks of the final layer.
    conditioning = itemsize * images * dim * 4
    final = _saved_by_modulate(rows, dim, images) + itemsize * rows * dim
    # The loss holds the output, x_t, target and a few images of their size, in fp32.
    loss = FLOAT * pixels * (2 * out_channels + 8 * channels)
    return timestep + conditioning + final + itemsize * pixels * channels + loss


def block_input(spec: ModelSpec, *, images: int, tokens: int, itemsize: int) -> int:
    """Bytes a recomputed block keeps: its input."""
    return itemsize * images * tokens * spec.dim


def backward_temporaries(spec: ModelSpec, *, images: int, tokens: int, itemsize: int) -> int:
    """Bytes of activation gradients alive at once, beyond what the block had saved, where that is most.

    Every operation frees what it saved as soon as its backward has run, so the candidates are few: for a dense block
    the gradients at its second matrix; for experts that of the shared expert's last matrix, of the weighted sum, and
    of the product inside SwiGLU.
    """
    rows = images * tokens
    stream, hidden = itemsize * rows * spec.dim, itemsize * rows * spec.mlp_hidden
    if not spec.is_moe:
        return 2 * stream + hidden
    k, wide = spec.top_k, FLOAT * rows * spec.dim  # the sum over experts runs in fp32
    shared = itemsize * rows * spec.shared_hidden
    at_shared = 2 * stream + wide + shared if shared else 0
    freed = 4 * shared
    at_sum = stream + wide * (2 * k + 3) - freed
    at_product = stream + (2 if spec.expert_kind == "swiglu" else 1) * k * hidden - freed
    return max(at_shared, at_sum, at_product)


def _saved_by_modulate(rows: int, dim: int, images: int) -> int:
    """fp32 whatever the storage: LayerNorm's input, mean and deviation; the normed rows and 1 + scale."""
    return FLOAT * (2 * rows * dim + 2 * rows + images * dim)


def _saved_by_mlp(spec: ModelSpec, rows: int, itemsize: int) -> int:
    """fc1's input, GELU's input and output, the gated branch."""
    return itemsize * rows * (2 * spec.dim + 2 * spec.mlp_hidden)


def _saved_by_moe(spec: ModelSpec, images: int, rows: int, itemsize: int) -> int:
    dim, k, experts = spec.dim, spec.top_k, spec.num_experts
    chosen = rows * k
    # Router in fp32: logits, probabilities, logsumexp, gates; then indices, positions and order of the slots.
    router = FLOAT * (rows * (2 * experts + 1) + chosen) + 3 * INDEX * chosen + INDEX * experts
    router += _upcast(rows * dim + experts * dim, itemsize) + FLOAT * images * experts
    if spec.renormalize:
        router += FLOAT * (rows + chosen)
    # Rows in and out of the experts; SwiGLU: gate, silu(gate), up, product; GELU: input and output, and an expert
    # number a row for each bias.
    inside = 4 if spec.expert_kind == "swiglu" else 2
    routed = itemsize * chosen * (2 * dim + inside * spec.mlp_hidden)
    if spec.expert_kind == "gelu":
        routed += 2 * INDEX * chosen
    shared = itemsize * rows * 4 * spec.shared_hidden
    # The tokens themselves are kept by the fp32 router or, in low precision, by the shared expert; and the gated
    # branch.
    tokens = itemsize * rows * dim if itemsize == FLOAT or spec.shared_hidden else 0
    return router + routed + shared + tokens + itemsize * rows * dim


def _saved_by_compiled_moe(spec: ModelSpec, images: int, rows: int, itemsize: int) -> int:
    """Of the routed experts only the tokens and the first products: neither rows nor activations nor results."""
    k, experts = spec.top_k, spec.num_experts
    router = FLOAT * rows * (experts + 1 + k) + FLOAT * images * experts
    places = 3 * INDEX * rows * k + (INDEX + FLOAT) * experts
    routed = itemsize * rows * k * spec.mlp_hidden * (2 if spec.expert_kind == "swiglu" else 1)
    shared = itemsize * rows * 3 * spec.shared_hidden
    # The tokens and the gated branch.
    return router + places + routed + shared + 2 * itemsize * rows * spec.dim


def _upcast(elements: int, itemsize: int) -> int:
    """Bytes of an fp32 copy, which fp32 storage does not need."""
    return 0 if itemsize == FLOAT else FLOAT * elements
