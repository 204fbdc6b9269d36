"""What a model costs: parameters and multiply-accumulates (MACs) by arithmetic, and MACs counted in the model itself.

The arithmetic is dsmoe.base.accounting. Counting runs the real model on the meta device, which takes no memory at any
size, under torch's operation counter with our own formulas for what that counter does not know. The numbers that
routing depends on do not exist there, so rows are split evenly over the experts; their sum, and with it the count, is
the same however tokens choose. Not here: seconds and bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode

from dsmoe.base.accounting import (
    TRAINING_FLOPS_PER_MAC,
    MacCount,
    ParameterCount,
    count_macs,
    count_parameters,
    visiting_all_experts,
)
from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.base.presets import PRESETS, ModelSpec
from dsmoe.base.recipe import list_recipes, load_recipe
from dsmoe.codec.identity import IdentityCodec
from dsmoe.data.scenes.catalogue import KINDS
from dsmoe.models.dit import DiT

ALL = "all"
RESOLUTION, CLASSES = 256, 1000
# Latents of every codec that is one (`none` is not): Stable Diffusion's shape, which the papers count (contracts 3).
LATENT_CHANNELS, LATENT_FACTOR = 4, 8
LARGE = (("XL/2", 512), ("XL-8E2A", 512))  # the sizes above 256 px that papers state


def grouped_flop(a: torch.Size, b: torch.Size, *_: object, **__: object) -> int:
    """Operations of torch._grouped_mm: rows [R, K] by matrices [E, K, M], or columns [K, R] by rows [R, M]; and of
    dsmoe::grouped_outer, rows [R, K] by rows [R, M].

    Each element of the first operand meets one row of M elements, whatever the sizes of the groups.
    """
    return 2 * prod(a) * b[-1]


def attention_flop(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
    """Operations of attention with q [..., T, d], k [..., S, d], v [..., S, d']: scores and weighted sums."""
    return 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def attention_backward_flop(
    _: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *__: object, **___: object
) -> int:
    """Operations of its backward pass: scores once more, then the gradients of weights, v, q and k."""
    return 2 * prod(q[:-1]) * k[-2] * (3 * q[-1] + 2 * v[-1])


def our_grouped_flop(x: torch.Size, w: torch.Size, _: torch.Size, transposed: bool, **__: object) -> int:
    """Operations of dsmoe::grouped_mm: rows [R, K] by matrices [E, K, M], or [E, M, K] when transposed."""
    return 2 * prod(x) * w[1 if transposed else 2]


def route_flop(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """Operations of dsmoe::route: tokens [N, D] by the gate [E, D]."""
    return 2 * prod(x) * weight[0]


def _of_one_expert(matrices: Iterable[torch.Size]) -> int:
    """Elements of one expert's matrices [E, out, in]; a stack of biases [E, 1, F + D] multiplies nothing."""
    return sum(prod(matrix[1:]) for matrix in matrices if matrix[1] != 1)


def moe_ffn_flop(x: torch.Size, gates: torch.Size, *rest: object, **_: object) -> int:
    """Operations of the products in dsmoe::moe_ffn: each row [D] of gates [N, k] by its expert's w1, w2, w3, each token
    by the shared expert's s1, s2, s3."""
    routed, shared = rest[5:8], [s for s in rest[8:11] if s is not None]
    return 2 * (prod(gates) * _of_one_expert(routed) + x[0] * sum(prod(s) for s in shared))


def moe_ffn_backward_flop(dy: torch.Size, x: torch.Size, gates: torch.Size, *rest: object, **_: object) -> int:
    """Operations of its backward: gradients of rows and, if wanted, of weights; h and up again if not kept."""
    w1, w2, w3, *shared, h = rest[5:12]
    times = 2 if rest[-1] else 1
    again = _of_one_expert((w1, w3)) if h is None else 0
    routed = prod(gates) * (_of_one_expert((w1, w2, w3)) * times + again)
    if shared[0] is None:
        return 2 * routed
    return 2 * (routed + x[0] * prod(shared[0]) * (3 * times + (2 if h is None else 0)))


# What torch 2.11 to 2.13 counts as nothing: grouped products (experts on a GPU) and attention on a CPU. An operation
# of ours that is registered with torch gets its line here; a mapping given to one counter, so nothing is global.
FORMULAS = {
    torch.ops.aten._grouped_mm: grouped_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flop,
    torch.ops.dsmoe.grouped_mm: our_grouped_flop,
    torch.ops.dsmoe.grouped_outer: grouped_flop,
}
_COMPILED = {"route": route_flop, "moe_ffn": moe_ffn_flop, "moe_ffn_backward": moe_ffn_backward_flop}
FORMULAS |= {
    getattr(torch.ops.dsmoe, name): formula for name, formula in _COMPILED.items() if hasattr(torch.ops.dsmoe, name)
}

# Where a product belongs, by the first of these that its module's name contains.
_COMPONENTS = (
    ("x_embedder", "patch_embed"),
    ("t_embedder", "timestep"),
    ("adaLN_modulation", "modulation"),
    ("attn.qkv", "projections"),
    ("attn.proj", "projections"),
    ("attn", "attention"),
    ("moe.gate", "router"),
    ("moe.experts", "experts"),
    ("moe.shared_experts", "shared_expert"),
    ("mlp", "mlp"),
    ("final_layer.linear", "output"),
)


@dataclass(frozen=True, kw_only=True)
class SizedModel:
    """A model with the sizes that data and codec give it. resolution: image side in pixels; channels: of the latent."""

    name: str
    spec: ModelSpec
    resolution: int = RESOLUTION
    channels: int = LATENT_CHANNELS
    factor: int = LATENT_FACTOR
    num_classes: int = CLASSES
    learn_sigma: bool = True
    null_class: bool = True

    def __post_init__(self) -> None:
        unit = self.factor * self.spec.patch
        if self.resolution < 1 or self.resolution % unit:
            raise ConfigError(
                f"resolution {self.resolution} of {self.name} is not a multiple of {unit} (latent factor {self.factor} "
                f"x patch {self.spec.patch}); choose such as {max(unit, round(self.resolution / unit) * unit)}."
            )
        if self.num_classes < 1:
            raise ConfigError(f"{self.num_classes} classes are not possible; give at least 1.")

    @property
    def input_size(self) -> int:
        """Side of the latent."""
        return self.resolution // self.factor

    @property
    def tokens(self) -> int:
        return (self.input_size // self.spec.patch) ** 2

    def parameters(self) -> ParameterCount:
        """By arithmetic."""
        return count_parameters(
            self.spec,
            channels=self.channels,
            num_classes=self.num_classes,
            input_size=self.input_size,
            learn_sigma=self.learn_sigma,
            null_class=self.null_class,
        )

    def macs(self, *, all_experts: bool = False) -> MacCount:
        """Forward MACs of one image by arithmetic, of the experts a token visits or of all."""
        spec = visiting_all_experts(self.spec) if all_experts else self.spec
        return count_macs(spec, channels=self.channels, input_size=self.input_size, learn_sigma=self.learn_sigma)

    def build(self, *, all_experts: bool = False) -> DiT:
        """The model, on torch's default device."""
        return DiT(
            visiting_all_experts(self.spec) if all_experts else self.spec,
            input_size=self.input_size,
            in_channels=self.channels,
            num_classes=self.num_classes,
            learn_sigma=self.learn_sigma,
            null_class=self.null_class,
        )


def sized_model(name: str, resolution: int | None = None, classes: int | None = None) -> SizedModel:
    """The preset or recipe of that name (or YAML file), at `resolution` pixels and with so many `classes`.

    Without them a recipe's own, else 256 pixels and ImageNet's 1000. ConfigError offers close names.
    """
    given = {"resolution": resolution, "num_classes": classes}
    given = {key: value for key, value in given.items() if value is not None}
    if name in PRESETS:
        return SizedModel(name=name, spec=PRESETS[name], **given)
    recipes = [recipe for recipe, _ in list_recipes()]
    if name not in recipes and not name.endswith((".yaml", ".yml")):
        raise ConfigError(choose_from("preset or recipe", name, [ALL, *PRESETS, *recipes]))
    recipe = load_recipe(name)
    sizes = {
        "resolution": recipe.data.resolution,
        "num_classes": len(KINDS) if recipe.data.source == "scenes" else CLASSES,
        "learn_sigma": recipe.diffusion.learn_sigma,
        "null_class": recipe.train.label_dropout > 0,
    }
    if recipe.codec.name == IdentityCodec.name:
        sizes |= {"channels": IdentityCodec.channels, "factor": IdentityCodec.factor}
    return SizedModel(name=recipe.name, spec=recipe.model, **(sizes | given))


def counter() -> FlopCounterMode:
    """torch's operation counter, silent, with our formulas; it counts two operations a MAC."""
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


def counted_forward(model: DiT) -> MacCount:
    """MACs of one image's forward pass, counted while `model` runs on its own device.

    Where one compiled operation takes the routed and the shared expert, both count as "experts".
    """
    found = counter()
    with found, torch.no_grad():
        model(*_one_image(model))
    return _by_component(found.get_flop_counts())


def counted_training(model: DiT) -> int:
    """MACs of one image's forward and backward pass, counted while `model` runs on its own device.

    A little off three forward passes: input and timestep features need no gradient (less), the biases of GELU experts
    get theirs as a matrix product (more), and fused attention computes its scores again (more; not on meta).
    """
    found = counter()
    with found:
        out, _ = model(*_one_image(model))
        out.square().mean().backward()
    return found.get_total_flops() // 2


def on_meta(sized: SizedModel, *, all_experts: bool = False) -> DiT:
    """The model without memory, to be counted."""
    with torch.device("meta"):
        return sized.build(all_experts=all_experts)


def _one_image(model: DiT) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = model.final_layer.linear.weight
    x = weight.new_zeros(1, model.in_channels, model.input_size, model.input_size)
    return x, weight.new_zeros(1), weight.new_zeros(1, dtype=torch.int64)


def _by_component(counts: dict[str, dict]) -> MacCount:
    """The counter's totals by module and operation, which include all modules below, as MACs by component."""
    totals = {name: dict(ops) for name, ops in counts.items() if name != "Global"}
    own = {name: dict(ops) for name, ops in totals.items()}
    for name, ops in totals.items():
        parent = name.rpartition(".")[0]
        while parent and parent not in own:
            parent = parent.rpartition(".")[0]  # a list of modules is not called, so it has no total
        for op, flops in ops.items() if parent else ():
            own[parent][op] -= flops
    macs = dict.fromkeys((component for _, component in _COMPONENTS), 0)
    for name, op, flops in ((name, op, flops) for name, ops in own.items() for op, flops in ops.items()):
        component = next((c for part, c in _COMPONENTS if part in name), None)
        assert component or not flops, f"{flops} operations in {name} belong to no component"
        # One module runs all experts; in pieces the routed ones' products are grouped, the shared one's plain.
        if component == "experts" and op is torch.ops.aten.mm:
            component = "shared_expert"
        if component:
            macs[component] += flops // 2
    return MacCount(**macs)


def training_tflop(macs: int) -> float:
    """TFLOP of training on one image by the rule of 6 operations a forward MAC."""
    return TRAINING_FLOPS_PER_MAC * macs / 1e12


def report(sized: SizedModel) -> str:
    """Everything about one model, by arithmetic and counted, in aligned lines."""
    spec, parameters, active, every = sized.spec, sized.parameters(), sized.macs(), sized.macs(all_experts=True)
    kind = f"DiT-MoE {spec.num_experts}E{spec.top_k}A {spec.expert_kind}" if spec.is_moe else "DiT"
    norm = ", q/k norm" if spec.qk_norm else ""
    side = sized.input_size
    model = on_meta(sized)
    forward, training = counted_forward(model), counted_training(model)
    counted_every = counted_forward(on_meta(sized, all_experts=True)) if spec.is_moe else forward
    rows = [
        (name, value, forward.by_component()[name])
        for name, value in active.by_component().items()
        if value or forward.by_component()[name]
    ]
    rows.append(("active", active.total, forward.total))
    if spec.is_moe:
        rows.append(("all experts", every.total, counted_every.total))
    return "\n".join(
        (
            f"{sized.name:<15}{kind}, depth {spec.depth}, dim {spec.dim}, heads {spec.heads}, patch {spec.patch}{norm}",
            f"{'input':<15}{sized.resolution} px, latent {sized.channels}x{side}x{side}, {sized.tokens} tokens, "
            f"{sized.num_classes} classes",
            f"{'parameters':<15}{parameters.total:,} total, {parameters.active:,} active a token, "
            f"{parameters.trained:,} trained",
            f"{'training':<15}{_digits(training_tflop(active.total))} TFLOP an image (6 x active MACs); counted "
            f"{_digits(2 * training / 1e12)} ({training / forward.total:.5f} x forward)",
            "",
            f"{'forward MACs':<15}{'arithmetic':>20}{'counted':>20}{'difference':>12}",
            *(f"{name:<15}{a:>20,}{b:>20,}{(b - a) / max(a, 1):>12.3%}" for name, a, b in rows),
        )
    )


def table(resolution: int | None = None, classes: int | None = None) -> str:
    """Every preset by arithmetic, as the markdown of docs/macs.md; without a resolution at 256, some also at 512."""
    sizes = [(name, resolution) for name in PRESETS] + ([] if resolution else list(LARGE))
    rows = []
    for sized in (sized_model(name, side, classes) for name, side in sizes):
        parameters, active, every = sized.parameters(), sized.macs().total, sized.macs(all_experts=True).total
        rows.append(
            f"| {sized.name} | {sized.resolution} | {parameters.total / 1e6:,.1f} | {parameters.active / 1e6:,.1f} | "
            f"{_digits(active / 1e9)} | {_digits(every / 1e9)} | {_digits(training_tflop(active))} |"
        )
    return "\n".join((_HEADING, *rows))


def _digits(value: float) -> str:
    """Four significant digits, zeros kept."""
    return f"{value:#.4g}".rstrip(".")


_HEADING = """# Parameters and multiply-accumulates of every preset

Made by `python -m dsmoe macs all`; `python -m dsmoe macs NAME` shows one of them, or a recipe, by component and counted
in the running model (tests/scaling/test_macs.py holds both to 0.1 %; they agree exactly).

- Parameters in millions, the fixed position embedding included as in the published tables. Active: what one token uses,
  that is all but the experts it does not visit.
- GMACs of one image's forward pass: all matrix products, the DiT paper's "Gflops". Active: each token visits its top-k
  experts, which is what runs. All experts: as if each token visited every expert of its block.
- TFLOP of training on one image: 6 x active MACs (two operations a MAC, backward twice forward), without recomputation.
- Latents 4 x (side / 8)^2, 1000 classes and the null class, learned variance (8 output channels).

| preset | px | parameters M | active M | GMACs | all experts | training TFLOP |
|---|---|---|---|---|---|---|"""
