"""Load-balance and z losses. All without coefficient: the caller multiplies, sums over layers, and logs.

Notation: E experts, k choices a token; P_e mean routing probability, f_e = E * (share of the choices that
went to e), so that sum_e P_e f_e is 1 when either is uniform. The share carries no gradient, P does.
"""

import torch
from torch import Tensor

from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.base.recipe import BALANCE_SCOPES


def check_scope(scope: str) -> str:
    """The scope itself if it is one of base.recipe.BALANCE_SCOPES, else ConfigError."""
    if scope not in BALANCE_SCOPES:
        raise ConfigError(choose_from("balance scope", scope, BALANCE_SCOPES))
    return scope


def counts_per_sample(indices: Tensor, batch: int, num_experts: int) -> Tensor:
    """Choices of each expert in each sample, int64 [B, E]; indices [N, k], N = B * T in sample order."""
    every = torch.arange(num_experts, device=indices.device)
    return (indices.reshape(batch, 1, indices.numel() // max(batch, 1)) == every[:, None]).sum(-1)


def sample_balance(probs: Tensor, counts: Tensor) -> Tensor:
    """Mean over images of E / (T k) * sum_e count_be P_be, P_be the mean probability within image b.

    probs [B, T, E], counts [B, E]. The loss of a batch is the mean of the losses of its images, so it does
    not depend on how images are laid out over micro-batches and ranks.
    """
    batch, tokens, experts = probs.shape
    if batch * tokens == 0:
        return probs.sum()
    # The means' divisors go to the counts, which have no gradient: half the operations each way.
    weight = shares(counts, probs.dtype) * (experts / (batch * tokens))
    return (probs.sum(1) * weight).sum()


def micro_balance(probs: Tensor, counts: Tensor) -> Tensor:
    """The loss published with DiT-MoE: sum_e P_e f_e over all tokens of this call (contracts 2.2).

    probs [B, T, E], counts [B, E]. Depends on the micro-batch by definition.
    """
    if probs.numel() == 0:
        return probs.sum()
    return load_balance(probs.mean((0, 1)), shares(counts.sum(0), probs.dtype))


def step_balance(probs: Tensor, previous_load: Tensor) -> Tensor:
    """sum_e P_e f_e, f from the load of the previous optimizer step: linear in the tokens, so layout-free.

    probs [B, T, E], previous_load [E] summing to 1.
    """
    if probs.numel() == 0:
        return probs.sum()
    return load_balance(probs.mean((0, 1)), previous_load.to(probs.dtype))


def selection_bias_step(counts: Tensor, rate: float) -> Tensor:
    """Change [E] of the selection bias after an optimizer step: +rate below the mean count, -rate above it, else 0.

    counts [E]: choices of the whole global batch, whole numbers, so that every layout takes the same decision
    (Wang et al. 2024, algorithm 1).
    """
    return rate * torch.sign(counts.sum() - counts.shape[0] * counts).to(torch.float32)


def load_balance(mean_probs: Tensor, load: Tensor) -> Tensor:
    """E * sum_e P_e load_e over the last dimension."""
    return mean_probs.shape[-1] * (mean_probs * load).sum(-1)


def shares(counts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Counts [..., E] over their sum; zeros where nothing was counted."""
    return counts.to(dtype) / counts.sum(-1, keepdim=True).clamp(min=1)


def z_loss(logsumexp: Tensor) -> Tensor:
    """Mean over tokens of the squared log-sum-exp [N] of the router logits (ST-MoE, Zoph 2022, eq. 5)."""
    return logsumexp.square().sum() / max(logsumexp.numel(), 1)
