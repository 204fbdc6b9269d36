"""Exponential moving averages of the fp32 master weights, sharded exactly as DeepSpeed shards them."""

import dataclasses
from collections.abc import Mapping

import torch

from dsmoe.base.recipe import EMA
from dsmoe.training.engine import Engine, Fragment


class Ema:
    """ema <- decay * ema + (1 - decay) * weights, fp32, once per optimizer step made; starts as a copy.

    decays: by name, the run's own `ema` among them (recipe's EmaSpec.step_decays). averages: this rank's fragments.
    Design decision 8: bf16 storage would lose updates at 0.9999, so only fp32 masters are averaged.
    """

    def __init__(self, engine: Engine, decays: Mapping[str, float]) -> None:
        self.decays = dict(decays)
        self._engine = engine
        self._place: tuple[int, ...] = ()
        self._weights: list[torch.Tensor] = []
        self.averages = {
            name: [dataclasses.replace(f, tensor=f.tensor.clone()) for f in engine.fragments()] for name in decays
        }

    @property
    def fragments(self) -> list[Fragment]:
        """The run's own average."""
        return self.averages[EMA]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of the step just made into the averages; nothing where it was skipped (fp16 overflow)."""
        if not self._engine.stepped:
            return
        place = self._engine.master_place()
        if place != self._place:  # offload and ZeRO-3 may hand out other storage after a step
            self._place, self._weights = place, [f.tensor for f in self._engine.fragments()]
        if self._weights:
            for name, decay in self.decays.items():
                torch._foreach_lerp_([f.tensor for f in self.averages[name]], self._weights, 1.0 - decay)
