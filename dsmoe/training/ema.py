"""Exponential moving average of the fp32 master weights, sharded exactly as DeepSpeed shards them."""

import torch

from dsmoe.training.engine import Engine, Fragment


class Ema:
    """ema <- decay * ema + (1 - decay) * weights, fp32, once per optimizer step; starts as a copy.

    Design decision 8: bf16 storage would lose updates at 0.9999, so only fp32 masters are averaged.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        self.fragments = [Fragment(f.name, f.shape, f.offset, f.tensor.clone()) for f in engine.fragments()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of the step just made into the average."""
        # The views are asked for anew: offload and ZeRO-3 may hand out other storage after a step.
        weights = [f.tensor for f in self._engine.fragments()]
        if weights:
            torch._foreach_lerp_([f.tensor for f in self.fragments], weights, 1.0 - self.decay)
