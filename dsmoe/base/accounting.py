"""Parameters and multiply-accumulates of an architecture, by arithmetic: no torch, no model is built.

Parameters are counted as published tables count them: the fixed position embedding is included in `total` and
`active`, because published checkpoints hold it as a (frozen) parameter; `trained` leaves it out.

Multiply-accumulates (MACs) follow the DiT paper, whose "Gflops" they are (contracts section 3): every matrix
product of one image's forward pass, attention's q.k and weights.v included, and of the routed experts only
the top_k a token visits ("active" in tables; "all experts" is the same network with top_k = num_experts, see
`visiting_all_experts`). Not counted: biases, normalisations, activations, softmax, modulation, residuals, the
label look-up. One training step costs three times the forward pass, two operations a MAC.
"""

import dataclasses
from dataclasses import asdict, dataclass

from dsmoe.base.presets import ModelSpec

TIMESTEP_DIM = 256
TRAINING_FLOPS_PER_MAC = 6  # two operations, and the backward pass costs twice the forward pass


@dataclass(frozen=True)
class ParameterCount:
    """total: all, position embedding included. active: total without the experts a token does not visit.

    trained: what an optimizer updates (total without the position embedding). routed: all routed experts of
    all blocks, the part expert parallelism divides.
    """

    total: int
    active: int
    trained: int
    routed: int


@dataclass(frozen=True)
class MacCount:
    """Forward multiply-accumulates of one image, by component; `total` is their sum.

    patch_embed: of a router every convolution, since it asks them all; timestep: the timestep MLP; modulation: all
    adaLN layers (once an image, not a token);
    projections: qkv and attention output; attention: q.k and weights.v; mlp: dense feed-forward; router;
    experts: the top_k routed experts; shared_expert; output: the final projection.
    """

    patch_embed: int
    timestep: int
    modulation: int
    projections: int
    attention: int
    mlp: int
    router: int
    experts: int
    shared_expert: int
    output: int

    @property
    def total(self) -> int:
        return sum(self.by_component().values())

    def by_component(self) -> dict[str, int]:
        return asdict(self)


def _tokens(spec: ModelSpec, input_size: int) -> int:
    assert input_size % spec.patch == 0, (input_size, spec.patch)
    return (input_size // spec.patch) ** 2


def _out_channels(channels: int, learn_sigma: bool) -> int:
    return channels * (2 if learn_sigma else 1)


def _expert_matrices(spec: ModelSpec) -> int:
    """Weights in the matrices of one routed expert."""
    return (3 if spec.expert_kind == "swiglu" else 2) * spec.dim * spec.mlp_hidden


def visiting_all_experts(spec: ModelSpec) -> ModelSpec:
    """The network in which every token visits every expert; `spec` itself when dense."""
    return dataclasses.replace(spec, top_k=spec.num_experts) if spec.is_moe else spec


def count_parameters(
    spec: ModelSpec,
    *,
    channels: int,
    num_classes: int,
    input_size: int,
    learn_sigma: bool,
    null_class: bool = True,
) -> ParameterCount:
    """Parameters of `DiT(spec, ...)`, whose arguments these are; `channels` is its in_channels."""
    dim, patch, hidden = spec.dim, spec.patch, spec.mlp_hidden
    out = patch**2 * _out_channels(channels, learn_sigma)
    position = _tokens(spec, input_size) * dim
    patch_embed = spec.patch_convolutions * (dim * spec.input_channels(channels) * patch**2 + dim)
    timestep = TIMESTEP_DIM * dim + dim + dim * dim + dim
    label = (num_classes + int(null_class)) * dim
    final = 2 * dim * (dim + 1) + out * (dim + 1)
    block = 3 * dim * (dim + 1) + dim * (dim + 1) + 6 * dim * (dim + 1) + int(spec.qk_norm) * 4 * spec.head_dim
    expert = 0
    if spec.is_moe:
        expert = _expert_matrices(spec) + (hidden + dim if spec.expert_kind == "gelu" else 0)
        block += spec.num_experts * (dim + expert) + 3 * dim * spec.shared_hidden
    else:
        block += 2 * dim * hidden + hidden + dim
    total = position + patch_embed + timestep + label + final + spec.depth * block
    routed = spec.depth * spec.num_experts * expert
    idle = spec.depth * (spec.num_experts - spec.top_k) * expert
    return ParameterCount(total=total, active=total - idle, trained=total - position, routed=routed)


def count_macs(spec: ModelSpec, *, channels: int, input_size: int, learn_sigma: bool) -> MacCount:
    """Multiply-accumulates of one image's forward pass; input_size is the side of the latent, channels its own."""
    dim, patch, tokens, depth = spec.dim, spec.patch, _tokens(spec, input_size), spec.depth
    moe = int(spec.is_moe)
    return MacCount(
        patch_embed=spec.patch_convolutions * tokens * spec.input_channels(channels) * patch**2 * dim,
        timestep=TIMESTEP_DIM * dim + dim * dim,
        modulation=depth * 6 * dim * dim + 2 * dim * dim,
        projections=depth * tokens * 4 * dim * dim,
        attention=depth * 2 * tokens * tokens * dim,
        mlp=(1 - moe) * depth * tokens * 2 * dim * spec.mlp_hidden,
        router=depth * tokens * spec.num_experts * dim,
        experts=moe * depth * tokens * spec.top_k * _expert_matrices(spec),
        shared_expert=moe * depth * tokens * 3 * dim * spec.shared_hidden,
        output=tokens * dim * patch**2 * _out_channels(channels, learn_sigma),
    )
