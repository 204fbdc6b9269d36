"""What one would take instead of `dsmoe.moe.MoE` on a GPU, beside moe_rivals.py: for gpu_suite.

Written where there was no GPU. What a CPU can run was run there and computes ours: sorted rows in plain torch, also
under torch.compile, Megatron-core's permutation, and ScatterMoE (47b5e15, in fp32 under Triton's interpreter, with
gradients). The adapters to MegaBlocks and SonicMoE were never run, only read against 78eea65 and 8565e84: their routers
are their own (rounded to bf16; renormalised), so their numbers cannot be compared.
"""

import importlib.util

import torch
from moe_rivals import AutoEP, Loop, Rival
from torch import Tensor
from torch.nn import functional as F

from dsmoe.moe import MoE


class CountedOnDevice(Rival):
    """Rows counted without a host synchronisation, which bincount on a GPU costs."""

    def by_expert(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = indices.flatten()
        order = flat.argsort(stable=True)
        counts = torch.zeros(self.count, dtype=torch.int64, device=x.device)
        return order, x[order // self.k], counts.scatter_add_(0, flat, torch.ones_like(flat))


class GpuAutoEP(CountedOnDevice, AutoEP):
    """AutoEP's experts; its own router counts without a synchronisation too (deepspeed/moe/ep_count.py)."""


class Grouped(CountedOnDevice):
    """Rows sorted by expert through torch's grouped product; bf16 on a GPU."""

    def routed(self, x: Tensor, gates: Tensor, indices: Tensor) -> Tensor:
        order, rows, counts = self.by_expert(x, indices)
        y = self.experts_of(rows, indices.flatten()[order], counts)
        y = y * gates.flatten()[order].to(x.dtype)[:, None]
        return torch.zeros_like(x).index_add(0, order // self.k, y)

    def experts_of(self, rows: Tensor, expert: Tensor, counts: Tensor) -> Tensor:
        """Sorted rows through their experts; expert [R]: of each row."""
        e, ends = self.experts, counts.cumsum(0, dtype=torch.int32)
        h = torch._grouped_mm(rows, e.w1.mT, offs=ends)
        if e.kind == "swiglu":
            a = F.silu(h) * torch._grouped_mm(rows, e.w3.mT, offs=ends)
            return torch._grouped_mm(a, e.w2.mT, offs=ends)
        b1, b2 = e.w3[:, 0].split((e.w1.shape[1], e.w1.shape[2]), dim=-1)
        a = F.gelu(h + b1[expert], approximate="tanh")
        return torch._grouped_mm(a, e.w2.mT, offs=ends) + b2[expert]


class CompiledGrouped(Grouped):
    """The same under torch.compile."""

    def __init__(self, ours: MoE) -> None:
        super().__init__(ours)
        self.compiled = torch.compile(super().forward)

    def forward(self, x: Tensor) -> Tensor:
        return self.compiled(x)


class CompiledLoop(Loop):
    """The per-expert loop under torch.compile, which breaks its graph where row counts are needed."""

    def __init__(self, ours: MoE) -> None:
        super().__init__(ours)
        self.compiled = torch.compile(super().forward)

    def forward(self, x: Tensor) -> Tensor:
        return self.compiled(x)


class Megatron(Grouped):
    """Megatron-core's permute and unpermute around the grouped products (its own need a library it does not bring)."""

    def routed(self, x: Tensor, gates: Tensor, indices: Tensor) -> Tensor:
        from megatron.core.transformer.moe.moe_utils import permute, unpermute

        chosen = torch.zeros(len(x), self.count, dtype=torch.bool, device=x.device).scatter_(1, indices, True)
        probs = torch.zeros(len(x), self.count, dtype=gates.dtype, device=x.device).scatter(1, indices, gates)
        rows, _, places = permute(x, chosen, num_out_tokens=indices.numel())
        counts = chosen.sum(0)
        every = torch.arange(self.count, device=x.device)
        expert = every.repeat_interleave(counts, output_size=indices.numel())
        y = self.experts_of(rows, expert, counts)
        return unpermute(y, places, x.shape, probs=probs.to(x.dtype), routing_map=chosen)


class MegaBlocks(Rival):
    """megablocks.layers.dmoe.dMoE with grouped products, without its balance loss, which it would collect for ever."""

    same_numbers, kinds = False, ("swiglu",)

    def __init__(self, ours: MoE) -> None:
        super().__init__(ours)
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import dMoE

        w1 = ours.experts.w1
        arguments = Arguments(
            hidden_size=w1.shape[2], ffn_hidden_size=w1.shape[1], moe_num_experts=self.count, moe_top_k=self.k,
            mlp_type="glu", mlp_impl="grouped", activation_fn=F.silu, bias=False, return_bias=False,
            moe_loss_weight=0.0, fp16=False, bf16=True, device=w1.device,
        )  # fmt: skip
        self.layer = dMoE(arguments)

    def moe(self, x: Tensor) -> Tensor:
        y = self.layer(x[:, None])
        return (y[0] if isinstance(y, tuple) else y)[:, 0]


class ScatterMoE(Rival):
    """scattermoe.mlp.GLUMLP with our routing and copies of our weights."""

    kinds = ("swiglu",)

    def __init__(self, ours: MoE) -> None:
        super().__init__(ours)
        from scattermoe.mlp import GLUMLP

        e = ours.experts
        self.layer = GLUMLP(e.w1.shape[2], e.w1.shape[1], self.count, self.k).to(e.w1.device, e.w1.dtype)
        with torch.no_grad():
            self.layer.experts.weight.copy_(torch.cat([e.w3, e.w1], dim=1))  # its gate is the second half
            self.layer.output_experts.weight.copy_(e.w2)

    def routed(self, x: Tensor, gates: Tensor, indices: Tensor) -> Tensor:
        return self.layer(x, gates.to(x.dtype), indices)


class SonicMoE(Rival):
    """sonicmoe.MoE."""

    same_numbers, kinds = False, ("swiglu",)

    def __init__(self, ours: MoE) -> None:
        super().__init__(ours)
        from sonicmoe import KernelBackendMoE
        from sonicmoe import MoE as Theirs
        from sonicmoe.enums import ActivationType

        w1 = ours.experts.w1
        self.backend = KernelBackendMoE.sonicmoe
        self.layer = Theirs(
            num_experts=self.count, num_experts_per_tok=self.k, hidden_size=w1.shape[2],
            intermediate_size=w1.shape[1], activation_function=ActivationType.SWIGLU, add_bias=False, std=0.02,
        ).to(w1.device, w1.dtype)  # fmt: skip

    def moe(self, x: Tensor) -> Tensor:
        return self.layer(x, kernel_backend_moe=self.backend)[0]


LOOP, AUTOEP = "per-expert loop", "AutoEP"
COMPILED, COMPILED_LOOP = "torch.compile, grouped", "torch.compile, loop"
GPU_RIVALS = {
    LOOP: Loop,
    "sorted, grouped products": Grouped,
    AUTOEP: GpuAutoEP,
    "Megatron-core permute": Megatron,
    "MegaBlocks": MegaBlocks,
    "ScatterMoE": ScatterMoE,
    "SonicMoE": SonicMoE,
    COMPILED: CompiledGrouped,
    COMPILED_LOOP: CompiledLoop,
}
_NEEDS = {
    AUTOEP: "deepspeed",
    "Megatron-core permute": "megatron.core",
    "MegaBlocks": "megablocks",
    "ScatterMoE": "scattermoe",
    "SonicMoE": "sonicmoe",
}


def missing(name: str) -> str | None:
    """ "PACKAGE is not installed" for a rival that cannot be had here, else None."""
    package = _NEEDS.get(name)
    try:
        found = package is None or importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"{package} is not installed"
