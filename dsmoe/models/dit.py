"""The diffusion transformer, dense or with experts. Written from DiT (Peebles & Xie 2023) and contracts 2.1,
2.2.

Here: blocks, final layer, the model. Not here: noise schedules and losses (diffusion), routing (moe),
published checkpoints (convert).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsmoe.base.activations import EXPERTS, RECOMPUTE
from dsmoe.base.errors import ConfigError
from dsmoe.base.presets import ModelSpec
from dsmoe.models.attention import Attention
from dsmoe.models.embedders import (
    FixedBufferModule,
    LabelEmbedder,
    Linear,
    PatchEmbed,
    PatchEmbedRouter,
    TimestepEmbedder,
    ZeroLinear,
    position_embedding,
    unpatchify,
)
from dsmoe.moe.block import MoE, MoEStats
from dsmoe.ops import modulate


class ModelStats(NamedTuple):
    """What the routers of one forward did; L layers, E experts, B images.

    balance_loss, z_loss: fp32 scalars, differentiable, summed over layers, without coefficient.
    load [L, E]: share of the N*k choices each expert got. importance [L, E]: mean router probability.
    load_per_sample [B, L, E]: load within each image. These three are detached fp32.
    """

    balance_loss: Tensor
    z_loss: Tensor
    load: Tensor
    importance: Tensor
    load_per_sample: Tensor


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear: [B, T, D] to [B, T, D]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _adaln(dim: int, chunks: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), ZeroLinear(dim, chunks * dim))


class Block(nn.Module):
    """One adaLN-Zero block: x += g*attn(mod(x)); x += g*mlp(mod(x)), modulated by c (contracts 2.1.2).

    The feed-forward part is `mlp` in a dense model and `moe` in a MoE model. A fresh block is the identity.
    """

    def __init__(self, spec: ModelSpec, *, moe_cls: type[nn.Module], **balance: object) -> None:
        super().__init__()
        self.is_moe = spec.is_moe
        self.attn = Attention(spec.dim, spec.heads, qk_norm=spec.qk_norm)
        if spec.is_moe:
            self.moe = moe_cls(spec, **balance)
        else:
            self.mlp = Mlp(spec.dim, spec.mlp_hidden)
        self.adaLN_modulation = _adaln(spec.dim, 6)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, MoEStats | None]:
        """x [B, T, D], c [B, D] to (x [B, T, D], router statistics or None)."""
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        # addcmul rounds once, where a multiply and an add would round twice in bf16.
        x = torch.addcmul(x, gate_msa[:, None], self.attn(modulate(x, shift_msa, scale_msa)))
        h = modulate(x, shift_mlp, scale_mlp)
        if self.is_moe:
            return self.moe(h, residual=x, ada_gate=gate_mlp)
        return torch.addcmul(x, gate_mlp[:, None], self.mlp(h)), None


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the output projection: [B, T, D] to [B, T, p*p*C_out]. Starts as zero."""

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.linear = ZeroLinear(dim, out_features)
        self.adaLN_modulation = _adaln(dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale))


class DiT(FixedBufferModule):
    """Class-conditional diffusion transformer over square latents.

    spec: the architecture. input_size: latent side S, a multiple of spec.patch (else ConfigError).
    in_channels: channels C of a latent; the input has C (1 + spec.conditions). num_classes: labels
    0..num_classes-1; with `null_class` one more row, index num_classes, stands for "no label". learn_sigma: the
    output has 2C channels, prediction then variance. balance_scope, selection_bias: passed to every MoE block.
    moe_cls: the MoE block, replaced by the training engine's subclass.

    Storage may be fp32, bf16 or fp64; LayerNorm, modulation, softmax, router and timestep features are
    computed in fp32 at least. `pos_embed` [1, T, D] is an fp32 buffer outside the state dict, whatever the
    storage dtype. Set `activation_checkpointing` to True to recompute each block in the backward pass, to "experts" to
    recompute only the inside of the experts.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        input_size: int,
        in_channels: int,
        num_classes: int,
        learn_sigma: bool,
        null_class: bool = True,
        balance_scope: str = "sample",
        selection_bias: bool = False,
        moe_cls: type[nn.Module] = MoE,
    ) -> None:
        super().__init__()
        if input_size < 1 or input_size % spec.patch:
            raise ConfigError(
                f"latent side {input_size} is not a multiple of model.patch {spec.patch}; "
                "choose another resolution or patch."
            )
        self.spec = spec
        self.input_size = input_size
        self.in_channels = spec.input_channels(in_channels)
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.num_classes = num_classes
        self.tokens = (input_size // spec.patch) ** 2
        self.register_fixed("pos_embed", position_embedding(spec.dim, input_size // spec.patch)[None])
        if spec.tasks > num_classes:
            raise ConfigError(f"model.tasks is {spec.tasks} but there are {num_classes} labels; give every task one.")
        if spec.tasks:
            first = num_classes - spec.tasks
            self.x_embedder = PatchEmbedRouter(self.in_channels, spec.dim, spec.patch, range(first, num_classes))
        else:
            self.x_embedder = PatchEmbed(self.in_channels, spec.dim, spec.patch)
        self.t_embedder = TimestepEmbedder(spec.dim)
        self.y_embedder = LabelEmbedder(num_classes, spec.dim, null_class)
        self.blocks = nn.ModuleList(
            Block(spec, moe_cls=moe_cls, balance_scope=balance_scope, selection_bias=selection_bias)
            for _ in range(spec.depth)
        )
        self.final_layer = FinalLayer(spec.dim, spec.patch**2 * self.out_channels)
        self.activation_checkpointing = False

    @property
    def activation_checkpointing(self) -> bool | str:
        """What the backward pass computes again: one of base.activations.RECOMPUTE."""
        return self._recompute

    @activation_checkpointing.setter
    def activation_checkpointing(self, what: bool | str) -> None:
        assert what in RECOMPUTE, what
        assert what != EXPERTS or self.spec.is_moe, "a dense model has no experts"
        self._recompute = what
        for block in self.blocks if self.spec.is_moe else ():
            block.moe.experts.recompute = what == EXPERTS

    def initialize(self) -> None:
        """Draw every parameter anew from torch's global generator, exactly as the constructor does.

        For a model built on the meta device and then given memory by `to_empty`; not for partitioned
        parameters. Bound b means U(-b, b):

        - x_embedder.proj (each of a router's), attn.qkv, attn.proj, mlp.fc1, mlp.fc2: weight b = sqrt(6/(in+out)),
          bias 0;
        - attn.q_norm, attn.k_norm: weight 1, bias 0;
        - t_embedder.mlp.{0,2}: weight N(0, 0.02), bias 0; y_embedder.embedding_table: N(0, 0.02);
        - every adaLN_modulation.1 and final_layer.linear: 0;
        - moe.gate.weight: b = 1/sqrt(D); moe.experts and moe.shared_experts matrices: b = sqrt(6/(in+out)) of
          one expert's matrix, expert biases 0.
        """
        _reset(self)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, ModelStats | None]:
        """Predict from noisy latents.

        x [B, C (1 + conditions), S, S], conditions first, the noisy latent last (contracts 2.3.4); t [B] float or
        int in the units the weights were trained with; y [B] int64, null label = num_classes. With spec.tasks the
        label, one of the last ones before the null label, also chooses the image's patch convolution.
        Returns (out [B, C or 2C, S, S] in the storage dtype, ModelStats, or None for a dense model).
        """
        assert x.shape[1:] == (self.in_channels, self.input_size, self.input_size), tuple(x.shape)
        tokens = self.x_embedder(x, y) if self.spec.tasks else self.x_embedder(x)
        tokens = (tokens + self.pos_embed).to(tokens.dtype)
        c = self.t_embedder(t) + self.y_embedder(y)
        layers: list[MoEStats] = []
        for block in self.blocks:
            if self.activation_checkpointing is True and torch.is_grad_enabled():
                # Nothing in a block draws from torch's generators, so their state need not be kept.
                tokens, stats = checkpoint(
                    _kept_to_the_end, block, tokens, c, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens, stats = block(tokens, c)
            if stats is not None:
                layers.append(stats)
        out = unpatchify(self.final_layer(tokens, c), self.spec.patch)
        return out, (_stack(layers) if layers else None)


class _KeepOutput(torch.autograd.Function):
    """The identity, whose backward pass asks for what it has kept."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        assert ctx.saved_tensors  # asking is what makes `checkpoint` compute the block again
        return grad


def _kept_to_the_end(block: Block, x: Tensor, c: Tensor) -> tuple[Tensor, MoEStats | None]:
    """A block to be recomputed: as a whole, before the backward pass enters it.

    The block's last operation may be the experts' own. ZeRO-3 gathers their weights as the backward pass reaches them
    and drops them after each forward: were the block computed anew only then, nothing would be left to go on with.
    """
    x, stats = block(x, c)
    return _KeepOutput.apply(x), stats


def _reset(module: nn.Module) -> None:
    """`reset_parameters` of every module below and then of this one: the order in which constructors call it."""
    for child in module.children():
        _reset(child)
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def _stack(layers: list[MoEStats]) -> ModelStats:
    return ModelStats(
        balance_loss=torch.stack([s.balance_loss for s in layers]).sum(),
        z_loss=torch.stack([s.z_loss for s in layers]).sum(),
        load=torch.stack([s.load for s in layers]),
        importance=torch.stack([s.importance for s in layers]),
        load_per_sample=torch.stack([s.load_per_sample for s in layers], dim=1),
    )
