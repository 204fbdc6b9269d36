"""Drawing initial weights: the same numbers whatever the storage type, the device and ZeRO make of a parameter."""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def initialize(parameter: Tensor, draw: Callable[[Tensor], object]) -> None:
    """Fill `parameter` with what `draw` makes of an fp32 tensor of its shape, drawn on the CPU and then rounded.

    Under DeepSpeed's zero.Init a parameter is bf16 on the GPU from birth, where the same seed gives other numbers.
    Nothing is drawn for the meta device.
    """
    if parameter.is_meta:
        return
    # Converted last: zero.Init makes every constructor, whatever its dtype argument, return the run's bf16.
    drawn = torch.empty(parameter.shape, device="cpu").to(torch.float32)
    draw(drawn)
    parameter.copy_(drawn)
