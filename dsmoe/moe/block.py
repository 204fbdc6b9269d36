"""The mixture-of-experts layer that takes the place of the MLP in a DiT block."""

import torch
from torch import Tensor, nn

from dsmoe import ops
from dsmoe.base.presets import ModelSpec
from dsmoe.moe import balance
from dsmoe.moe.experts import End, Experts
from dsmoe.moe.fan_out import fan_out
from dsmoe.moe.router import Gate
from dsmoe.moe.shared import SharedExpert
from dsmoe.moe.statistics import MoEStats


class MoE(nn.Module):
    """sum over the top-k experts of p_e E_e(x), plus Shared(x) (DiT-MoE, Fei et al. 2024; contracts 2.2).

    Parameters: gate.weight, experts.{w1,w2,w3}, and with spec.shared_ratio > 0
    shared_experts.{gate_proj,up_proj,down_proj}.weight. balance_scope: one of base.recipe.BALANCE_SCOPES. The buffer
    previous_load [E] serves scope "step" only; it starts uniform and is kept in the checkpoint by training.
    selection_bias: with a buffer of that name [E], part of the state dict, which balancing without a loss moves after
    every optimizer step (update_selection_bias) and which steers the choice of experts, not their gates.
    """

    def __init__(self, spec: ModelSpec, *, balance_scope: str = "sample", selection_bias: bool = False) -> None:
        nn.Module.__init__(self)  # not super(): the engine's subclass has a second base, which builds itself otherwise
        assert spec.is_moe, "a dense spec has no experts"
        self.balance_scope = balance.check_scope(balance_scope)
        self.gate = Gate(spec.dim, spec.num_experts, spec.top_k, spec.renormalize)
        self.experts = self.new_experts(spec)
        self.shared_experts = SharedExpert(spec.dim, spec.shared_hidden) if spec.shared_hidden else None
        # Converted last: under zero.Init every constructor, whatever its dtype argument, returns the run's bf16.
        load = torch.ones(spec.num_experts).to(torch.float32)
        self.register_buffer("previous_load", load, persistent=False)
        self.register_buffer("selection_bias", load.clone().zero_() if selection_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform previous load, no bias; the parameters are the children's own (`DiT.initialize` comes here too)."""
        self.previous_load.fill_(1.0 / self.previous_load.numel())
        if self.selection_bias is not None:
            self.selection_bias.zero_()

    def forward(
        self, x: Tensor, *, residual: Tensor | None = None, ada_gate: Tensor | None = None
    ) -> tuple[Tensor, MoEStats]:
        """x [B, T, D] -> (y [B, T, D] in the dtype of x, MoEStats). T tokens of one image stand together.

        With ada_gate [B, D] and residual [B, T, D], the end of a DiT block: residual + ada_gate * y, rounded once.
        """
        tokens = x.reshape(-1, x.shape[-1])
        for_gate, *for_experts = fan_out(tokens, 3)
        routing = self.gate(for_gate, self.selection_bias)
        end = End(None if residual is None else residual.reshape(tokens.shape), ada_gate)
        y = self.mixture(*for_experts, routing, end)
        return y.view(x.shape), self._stats(routing, x.shape[0], x.shape[1])

    def new_experts(self, spec: ModelSpec) -> Experts:
        """The routed experts that live here; where expert parallelism enters, with `mixture`."""
        return Experts(spec.expert_kind, spec.num_experts, spec.dim, spec.mlp_hidden)

    def mixture(self, tokens: Tensor, for_shared: Tensor, routing: ops.Routing, end: End) -> Tensor:
        """tokens [N, D] -> what the routed experts, and the shared one if any, make of them, ended by `end`, [N, D].

        for_shared: the same tokens for a shared expert that is called by itself. Here one operation covers all experts.
        """
        return self.experts(tokens, routing.counts, routing=routing, shared=self.shared_experts, end=end)

    @torch.no_grad()
    def update_previous_load(self, load: Tensor) -> None:
        """Set the load [E] of the optimizer step just done (global share of the choices) for scope "step"."""
        self.previous_load.copy_(load)

    @torch.no_grad()
    def update_selection_bias(self, counts: Tensor, rate: float) -> None:
        """Move the bias by `rate` against the load of the optimizer step just done; counts [E] of the global batch."""
        self.selection_bias += balance.selection_bias_step(counts, rate)

    def _stats(self, routing: ops.Routing, batch: int, tokens: int) -> MoEStats:
        probs = routing.probs.unflatten(0, (batch, tokens))
        counts = balance.counts_per_sample(routing.indices, batch, probs.shape[-1])
        if self.balance_scope == "sample":
            loss = balance.sample_balance(probs, counts)
        elif self.balance_scope == "micro":
            loss = balance.micro_balance(probs, counts)
        elif self.balance_scope == "step":
            loss = balance.step_balance(probs, self.previous_load)
        else:
            loss = probs.new_zeros(())
        importance = routing.prob_sum.detach() / max(batch * tokens, 1)
        return MoEStats(
            balance_loss=loss,
            z_loss=balance.z_loss(routing.logsumexp),
            load=balance.shares(routing.counts),
            importance=importance.to(torch.float32),
            load_per_sample=balance.shares(counts),
        )

    def _apply(self, fn, recurse: bool = True) -> "MoE":
        """Casting the module to bf16 must not round the load and the bias."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if self._buffers[name].dtype != before.dtype:
                self._buffers[name] = before.to(self._buffers[name].device)
        return self
