"""Bytes that autograd keeps of a forward pass, and what a backward pass needs beside them, by arithmetic (no torch).

Counted from what the modules of `models` and `moe` and the operations save: the reference ones or, with `compiled`, the
compiled ones, which keep less. A test holds every formula against torch's own saved tensors. Letters: R = images x
tokens, D dim, F hidden units, k experts a token. Weights are not counted here, nor is anything of a few bytes an image.
"""

from dsmoe.base.accounting import TIMESTEP_DIM
from dsmoe.base.presets import ModelSpec

FLOAT, INDEX = 4, 8
EXPERTS = "experts"
# What is computed again in the backward pass, as dsmoe.activation_checkpointing in a ds_config says it: nothing, the
# inside of the experts, or (true) every block.
RECOMPUTE = (False, EXPERTS, True)


def saved_by_block(
    spec: ModelSpec,
    *,
    images: int,
    tokens: int,
    itemsize: int,
    compiled: bool = False,
    spread: bool = False,
    lean: bool = False,
) -> int:
    """Bytes one block keeps from its forward to its backward pass; itemsize: bytes of a stored element (fp32 4).

    spread: under expert parallelism, where rows travel and no operation covers the whole block. lean: the inside of
    the experts is computed again.
    """
    rows, dim = images * tokens, spec.dim
    stream = itemsize * rows * dim
    # adaLN: silu(c), and the six chunks of its layer's output, alive through the gates.
    modulation = itemsize * images * dim * 7
    # qkv's input, q|k|v, attention's output (also proj's input) and the gated branch; logsumexp of every head.
    attention = 6 * stream + FLOAT * rows * spec.heads
    if spec.qk_norm:  # both norms' outputs and statistics; then attention's output also comes in another layout
        attention += 3 * stream + 2 * 2 * itemsize * rows * spec.heads
    if spec.is_moe:
        feed_forward = _saved_by_router(spec, images, rows, itemsize, compiled, spread)
        feed_forward += _saved_by_experts(spec, rows, itemsize, compiled, spread, lean)
    else:
        feed_forward = _saved_by_mlp(spec, rows, itemsize)
    return modulation + attention + feed_forward + 2 * _saved_by_modulate(rows, dim, images, itemsize, compiled)


def saved_outside_blocks(
    spec: ModelSpec,
    *,
    images: int,
    tokens: int,
    channels: int,
    out_channels: int,
    itemsize: int,
    compiled: bool = False,
) -> int:
    """Bytes that embedders, final layer and their shared conditioning vector keep."""
    rows, dim, pixels = images * tokens, spec.dim, images * tokens * spec.patch**2
    timestep = itemsize * images * (TIMESTEP_DIM + 2 * dim)
    # The conditioning vector, its silu and the two chunks of the final layer.
    conditioning = itemsize * images * dim * 4
    final = _saved_by_modulate(rows, dim, images, itemsize, compiled) + itemsize * rows * dim
    # The loss holds the output, x_t, target and a few images of their size, in fp32.
    loss = FLOAT * pixels * (2 * out_channels + 8 * channels)
    return timestep + conditioning + final + itemsize * pixels * channels + loss


def block_input(spec: ModelSpec, *, images: int, tokens: int, itemsize: int) -> int:
    """Bytes a recomputed block keeps: its input."""
    return itemsize * images * tokens * spec.dim


def backward_temporaries(
    spec: ModelSpec, *, images: int, tokens: int, itemsize: int, compiled: bool = False, one_by_one: bool = False
) -> int:
    """Bytes of activation gradients alive at once, beyond what the block had saved, where that is most.

    Every operation frees what it saved as soon as its backward has run, so the candidates are few: for a dense block
    the gradients at its second matrix; for experts that of the shared expert's last matrix, of the weighted sum, and
    of the product inside SwiGLU. compiled: the experts are one operation (`compiled_temporaries`; one_by_one there).
    """
    rows = images * tokens
    stream, hidden = itemsize * rows * spec.dim, itemsize * rows * spec.mlp_hidden
    if not spec.is_moe:
        return 2 * stream + hidden
    k, wide = spec.top_k, FLOAT * rows * spec.dim  # the sum over experts runs in fp32
    shared = itemsize * rows * spec.shared_hidden
    swiglu = spec.expert_kind == "swiglu"
    if compiled:
        return compiled_temporaries(spec, rows=rows, itemsize=itemsize, one_by_one=one_by_one)
    at_shared = 2 * stream + wide + shared if shared else 0
    freed = 4 * shared
    at_sum = stream + wide * (2 * k + 3) - freed
    at_product = stream + (2 if swiglu else 1) * k * hidden - freed
    return max(at_shared, at_sum, at_product)


def compiled_temporaries(spec: ModelSpec, *, rows: int, itemsize: int, one_by_one: bool) -> int:
    """Bytes alive in the backward of the compiled block beside what it saved and the gradients of weights.

    At the activation's backward: the gradients of the result and, where a shared expert or second biases ask for it,
    of the gated sum; a row of tokens and one of gradients for each choice; of hidden units da, dh, the activation, and
    dup for SwiGLU, the shared expert's beside them in memory of its own stream. one_by_one: as on a CPU, where of all
    but the gradients' rows there is one expert's part (routing balanced), the shared expert's first.
    """
    chosen, swiglu = rows * spec.top_k, spec.expert_kind == "swiglu"
    stream, choices = itemsize * rows * spec.dim, itemsize * chosen * spec.dim
    hidden = (3 + swiglu) * itemsize * chosen * spec.mlp_hidden
    shared, beside = 4 * itemsize * rows * spec.shared_hidden, stream if spec.shared_hidden else 0
    gradients = stream * (1 if swiglu and not shared else 2)
    if not one_by_one:
        return gradients + 2 * choices + hidden + shared + beside
    at_end = stream + (0 if swiglu else FLOAT * rows * spec.dim)  # the gradient of the tokens; of second biases, wide
    return gradients + choices + max(shared, beside + max((choices + hidden) // spec.num_experts, at_end))


def _saved_by_modulate(rows: int, dim: int, images: int, itemsize: int, compiled: bool) -> int:
    """Compiled: the input and two statistics. Else fp32 whatever the storage: LayerNorm's input, mean and deviation;
    the normed rows and 1 + scale."""
    if compiled:
        return itemsize * rows * dim + 2 * FLOAT * rows
    return FLOAT * (2 * rows * dim + 2 * rows + images * dim)


def _saved_by_mlp(spec: ModelSpec, rows: int, itemsize: int) -> int:
    """fc1's input, GELU's input and output, the gated branch."""
    return itemsize * rows * (2 * spec.dim + 2 * spec.mlp_hidden)


def _saved_by_router(spec: ModelSpec, images: int, rows: int, itemsize: int, compiled: bool, spread: bool) -> int:
    """fp32 (with copies of tokens and weight where those are narrower, unless compiled): probabilities, gates, balance;
    then indices, positions and order of the slots, of which the compiled sum of spread rows does without the last."""
    dim, experts, chosen = spec.dim, spec.num_experts, rows * spec.top_k
    places = 3 * INDEX * chosen + INDEX * experts
    if compiled:
        places += -INDEX * chosen if spread else FLOAT * experts
        return FLOAT * (rows * (experts + 1) + chosen + images * experts) + places
    router = FLOAT * (rows * (2 * experts + 1) + chosen + images * experts) + places
    router += FLOAT * (rows + chosen) if spec.renormalize else 0
    return router + (0 if itemsize == FLOAT else FLOAT * (rows * dim + experts * dim))


def _saved_by_experts(spec: ModelSpec, rows: int, itemsize: int, compiled: bool, spread: bool, lean: bool) -> int:
    """Routed and shared experts, the tokens, and the gated branch."""
    chosen, swiglu, whole = rows * spec.top_k, spec.expert_kind == "swiglu", compiled and not spread
    if whole:  # neither rows nor activations nor results: the first products alone
        routed = 0 if lean else itemsize * chosen * spec.mlp_hidden * (1 + swiglu)
    elif lean:  # results, for the gradient of the gates; rows where they came from other ranks
        routed = itemsize * chosen * spec.dim * (1 + spread)
    else:
        # Rows in and out of the experts; SwiGLU: gate, silu(gate) unless compiled, up, product; GELU: input and output,
        # and an expert number a row for each bias that is not added inside the activation.
        inside = (3 if compiled else 4) if swiglu else 2
        routed = itemsize * chosen * (2 * spec.dim + inside * spec.mlp_hidden)
        routed += 0 if swiglu else (1 if compiled else 2) * INDEX * chosen
    if spread:  # where each row stands by source and by expert
        routed += 2 * INDEX * chosen
    # Of the shared expert: gate and up; where it is not in the block's operation also their product, and silu(gate)
    # unless compiled.
    units = 0 if lean and not spread else 2 if whole else 3 if compiled else 4
    shared = itemsize * rows * units * spec.shared_hidden
    # The tokens are kept by whichever takes them as they are: the router, a shared expert, experts computed again.
    as_they_are = compiled or itemsize == FLOAT or spec.shared_hidden or (lean and not spread)
    return routed + shared + itemsize * rows * spec.dim * (2 if as_they_are else 1)
