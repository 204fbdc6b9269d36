"""What one would write or take instead of `dsmoe.moe.MoE`: MoE layers with its weights, for benchmarks/moe_layer.py.

Each takes tokens [N, D] and returns [N, D]: top-2 softmax over all experts, not renormalised, and a shared expert where
ours has one. All but `DeepSpeedMoE` compute the same numbers. Those that only make sense on a GPU: moe_gpu_rivals.py.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsmoe.moe import MoE


class Rival(nn.Module):
    """Holds our layer's parameters; subclasses say how routed tokens are computed."""

    same_numbers = True
    kinds = ("swiglu", "gelu")  # of experts that it can have

    def __init__(self, ours: MoE) -> None:
        super().__init__()
        self.ours, self.experts, self.k = ours, ours.experts, ours.gate.top_k
        self.count = ours.experts.num_experts

    def forward(self, x: Tensor) -> Tensor:
        y, shared = self.moe(x), self.ours.shared_experts
        if shared is None:
            return y
        return y + F.linear(F.silu(shared.gate_proj(x)) * shared.up_proj(x), shared.down_proj.weight)

    def moe(self, x: Tensor) -> Tensor:
        """Routed tokens; overridden by those that bring their own router, which then do not pay for ours."""
        probs = F.linear(x.float(), self.ours.gate.weight.float()).softmax(-1)
        return self.routed(x, *probs.topk(self.k, dim=-1))

    def routed(self, x: Tensor, gates: Tensor, indices: Tensor) -> Tensor:
        """Gated sum of each token's experts; gates, indices [N, k]."""
        raise NotImplementedError

    def expert(self, rows: Tensor, i: int) -> Tensor:
        """Rows through expert i."""
        w1, w2, w3 = self.experts.w1[i], self.experts.w2[i], self.experts.w3[i]
        if self.experts.kind == "swiglu":
            return F.linear(F.silu(F.linear(rows, w1)) * F.linear(rows, w3), w2)
        b1, b2 = w3[0].split((w1.shape[0], w1.shape[1]))
        return F.linear(F.gelu(F.linear(rows, w1, b1), approximate="tanh"), w2, b2)

    def by_expert(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots in expert order, their tokens' rows, and how many each expert has."""
        flat = indices.flatten()
        order = flat.argsort(stable=True)
        return order, x[order // self.k], flat.bincount(minlength=self.count)


class Loop(Rival):
    """The per-expert loop with boolean masks over repeated tokens, as in the published DiT-MoE training code."""

    def routed(self, x: Tensor, gates: Tensor, indices: Tensor) -> Tensor:
        repeated, flat = x.repeat_interleave(self.k, dim=0), indices.flatten()
        y = torch.empty_like(repeated)
        for i in range(self.count):
            mine = flat == i
            y[mine] = self.expert(repeated[mine], i)
        return (y.view(*indices.shape, -1) * gates.to(x.dtype)[..., None]).sum(1)


class Slices(Rival):
    """Rows sorted by expert, a linear layer on each slice."""

    def routed(self, x: Tensor, gates: Tensor, indices: Tensor) -> Tensor:
        order, rows, counts = self.by_expert(x, indices)
        parts = rows.split(counts.tolist())
        y = torch.cat([self.expert(part, i) for i, part in enumerate(parts)])
        y = y * gates.flatten()[order].to(x.dtype)[:, None]
        return torch.zeros_like(x).index_add(0, order // self.k, y)


class Einsum(Rival):
    """GShard: one-hot dispatch and combine tensors, room for the busiest expert's tokens, so that none is dropped."""

    kinds = ("swiglu",)

    def routed(self, x: Tensor, gates: Tensor, indices: Tensor) -> Tensor:
        chosen = F.one_hot(indices, self.count)  # [N, k, E]
        flat = chosen.flatten(0, 1)
        place = ((flat.cumsum(0) - 1) * flat).sum(-1).view(indices.shape)
        room = int(place.max()) + 1
        slots = F.one_hot(place, room).to(x.dtype)
        combine = torch.einsum("nke,nkc,nk->nec", chosen.to(x.dtype), slots, gates.to(x.dtype))
        rows = torch.einsum("nec,nd->ecd", (combine.detach() > 0).to(x.dtype), x)
        e = self.experts
        h = F.silu(torch.bmm(rows, e.w1.mT)) * torch.bmm(rows, e.w3.mT)
        return torch.einsum("nec,ecd->nd", combine, torch.bmm(h, e.w2.mT))


class AutoEP(Rival):
    """DeepSpeed's AutoEP experts (deepspeed.moe.ep_experts.GroupedExperts) between sorted rows and a weighted sum."""

    kinds = ("swiglu",)

    def __init__(self, ours: MoE) -> None:
        super().__init__(ours)
        from deepspeed.moe.ep_experts import GroupedExperts

        e = ours.experts
        self.grouped = GroupedExperts(e.w1.shape[2], e.w1.shape[1], self.count)
        self.grouped.w1, self.grouped.w2, self.grouped.w3 = e.w1, e.w2, e.w3

    def routed(self, x: Tensor, gates: Tensor, indices: Tensor) -> Tensor:
        order, rows, counts = self.by_expert(x, indices)
        y = self.grouped(rows, counts)
        y = y * gates.flatten()[order].to(x.dtype)[:, None]
        return torch.zeros_like(x).index_add(0, order // self.k, y)


class DeepSpeedMoE(Rival):
    """deepspeed.moe.layer.MoE: renormalised gates, so other numbers; experts of its own; nothing dropped."""

    same_numbers = False
    kinds = ("swiglu",)

    def __init__(self, ours: MoE) -> None:
        super().__init__(ours)
        from deepspeed.moe.layer import MoE as Theirs

        d, f = ours.experts.w1.shape[2], ours.experts.w1.shape[1]
        self.layer = Theirs(
            d, _Swiglu(d, f), num_experts=self.count, k=self.k, drop_tokens=False, top2_2nd_expert_sampling=False
        )
        self.layer.set_deepspeed_parallelism()
        self.layer.to(ours.experts.w1.dtype)
        self.layer.deepspeed_moe.gate.wg.float()

    def moe(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class _Swiglu(nn.Module):
    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (
            nn.Linear(d, f, bias=False),
            nn.Linear(f, d, bias=False),
            nn.Linear(d, f, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


RIVALS = {
    "per-expert loop": Loop,
    "sorted slices": Slices,
    "GShard einsum": Einsum,
    "DeepSpeed MoE": DeepSpeedMoE,
    "AutoEP": AutoEP,
}


def agree(y: Tensor, truth: Tensor) -> bool:
    """Whether two layers computed the same, up to rounding in their dtype. Right ones differ by 0.5 eps in bf16, and in
    fp32 by 1.3 with products of one library, by 4.2 with other chains of sums (D 64 to 1024); one wrong token among
    500 is about sqrt(2 / 500), 8 eps of bf16."""
    allowed = 16 if y.dtype == torch.float32 else 4
    return bool((y - truth).norm() <= allowed * torch.finfo(y.dtype).eps * truth.norm())
