"""Mixture of experts: router, dispatch, experts, shared expert, balance losses and statistics."""

from dsmoe.moe.block import MoE
from dsmoe.moe.statistics import MoEStats

__all__ = ["MoE", "MoEStats"]
