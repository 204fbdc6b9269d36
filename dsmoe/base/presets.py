"""Architectures by name: the paper's tables, the published DiT and DiT-MoE families, and CPU sizes."""

import dataclasses
from dataclasses import dataclass

from dsmoe.base.errors import ConfigError, choose_from

EXPERT_KINDS = ("swiglu", "gelu")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a DiT is made of, apart from what data and codec decide (input size, channels, classes).

    depth, dim, heads: number of blocks, hidden size D, attention heads (heads divides dim).
    patch: side of a square patch in latent pixels.
    mlp_ratio: hidden size of the dense MLP and of one routed expert, in units of dim.
    num_experts: routed experts a block; 0 makes a dense DiT.
    top_k: experts a token visits (ignored when dense).
    expert_kind: "swiglu" (three matrices, no bias; DiT-MoE) or "gelu" (two matrices with biases; upcycled DiT).
    shared_ratio: hidden size of the always-on SwiGLU shared expert in units of dim; 0 for none.
    renormalize: divide the top-k probabilities by their sum (off in published DiT-MoE weights).
    qk_norm: LayerNorm over each head's queries and keys before their product (the released DiT-MoE XL and G).
    conditions: clean latents that stand before the noisy one in the input, of its channels each (perception).
    tasks: 0, or how many labels (the last ones of the class table) have a patch convolution of their own
    (contracts 2.3); every image then needs such a label.
    """

    depth: int
    dim: int
    heads: int
    patch: int = 2
    mlp_ratio: float = 4.0
    num_experts: int = 0
    top_k: int = 2
    expert_kind: str = "swiglu"
    shared_ratio: float = 0.0
    renormalize: bool = False
    qk_norm: bool = False
    conditions: int = 0
    tasks: int = 0

    def __post_init__(self) -> None:
        for name in ("depth", "dim", "heads", "patch", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.mlp_ratio <= 0:
            raise ConfigError(f"model.mlp_ratio is {self.mlp_ratio}; it must be above 0.")
        for name in ("num_experts", "shared_ratio", "conditions", "tasks"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; it may not be negative (0 means none).")
        if self.mlp_hidden < 1 or (self.shared_ratio > 0 and self.shared_hidden < 1):
            raise ConfigError(
                f"model.mlp_ratio {self.mlp_ratio} and model.shared_ratio {self.shared_ratio} of model.dim {self.dim} "
                "make a layer without hidden units; raise the ratio (model.shared_ratio 0 means none)."
            )
        if self.dim % self.heads:
            raise ConfigError(f"model.heads {self.heads} does not divide model.dim {self.dim}; choose a divisor.")
        if self.dim % 4:
            raise ConfigError(f"model.dim is {self.dim}; the 2-D position embedding needs a multiple of 4.")
        if self.num_experts and self.top_k > self.num_experts:
            raise ConfigError(f"model.top_k {self.top_k} exceeds model.num_experts {self.num_experts}; lower it.")
        if self.expert_kind not in EXPERT_KINDS:
            raise ConfigError(choose_from("model.expert_kind", self.expert_kind, EXPERT_KINDS))

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def patch_convolutions(self) -> int:
        """How many there are: one, or one a task."""
        return max(self.tasks, 1)

    def input_channels(self, channels: int) -> int:
        """Channels of the network's input when a latent has `channels`: the conditions and the noisy one."""
        return channels * (1 + self.conditions)

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.dim // self.heads

    @property
    def mlp_hidden(self) -> int:
        """Hidden units of the dense MLP and of each routed expert."""
        return int(self.dim * self.mlp_ratio)

    @property
    def shared_hidden(self) -> int:
        """Hidden units of the shared expert, 0 for none."""
        return int(self.dim * self.shared_ratio)


def _dense(depth: int, dim: int, heads: int, patch: int = 2) -> ModelSpec:
    return ModelSpec(depth=depth, dim=dim, heads=heads, patch=patch)


def _moe(depth: int, dim: int, heads: int, experts: int, qk_norm: bool = False) -> ModelSpec:
    return ModelSpec(depth=depth, dim=dim, heads=heads, num_experts=experts, shared_ratio=2.0, qk_norm=qk_norm)


_DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

PRESETS: dict[str, ModelSpec] = {
    # Paper Table 1.
    "a1": _dense(12, 256, 16),
    "a2": _dense(16, 512, 16),
    "a3": _dense(20, 768, 16),
    "a4": _dense(24, 1024, 16),
    "a5": _dense(28, 1536, 16),
    "a6": _dense(32, 1792, 16),
    # DiT (Peebles & Xie 2023), Table 1.
    **{f"{size}/{patch}": _dense(*shape, patch) for size, shape in _DIT_SIZES.items() for patch in (2, 4, 8)},
    # Paper Table 2 and the DiT-MoE family (Fei et al. 2024), whose two largest have q/k norms (contracts 2.2).
    "S/2-8E2A": _moe(12, 384, 6, 8),
    "S/2-16E2A": _moe(12, 384, 6, 16),
    "B/2-8E2A": _moe(12, 768, 12, 8),
    "L/2-8E2A": _moe(24, 1024, 16, 8),
    "XL/2-8E2A": _moe(28, 1152, 16, 8, qk_norm=True),
    "G/2-16E2A": _moe(40, 1408, 16, 16, qk_norm=True),
    # The paper's upcycled generalist backbone: DiT-XL/2 with GELU experts, no shared expert (section 4.4).
    "XL-8E2A": ModelSpec(depth=28, dim=1152, heads=16, num_experts=8, expert_kind="gelu"),
    # The same with the authors' inputs: image and prompt latents, four tasks (contracts 2.3).
    "XL-8E2A-generalist": ModelSpec(
        depth=28, dim=1152, heads=16, num_experts=8, expert_kind="gelu", conditions=2, tasks=4
    ),
    # CPU sizes, ours.
    "nano": _dense(4, 128, 4),
    "nano-4E2A": _moe(4, 128, 4, 4),
    "nano-8E2A": dataclasses.replace(_moe(6, 128, 4, 8), mlp_ratio=2.0),
    "micro": _dense(6, 192, 6),
    "micro-8E2A": _moe(6, 192, 6, 8),
}


def preset(name: str, **changes: object) -> ModelSpec:
    """The named architecture, with fields replaced; ConfigError names close presets or fields."""
    if name not in PRESETS:
        raise ConfigError(choose_from("model.preset", name, PRESETS))
    fields = {f.name for f in dataclasses.fields(ModelSpec)}
    for key in changes:
        if key not in fields:
            raise ConfigError(choose_from("model key", key, sorted(fields)))
    return dataclasses.replace(PRESETS[name], **changes)
