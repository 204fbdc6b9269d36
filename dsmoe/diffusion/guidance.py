"""Classifier-free guidance around a class-conditional model. Not here: the samplers that call the result."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsmoe.base.errors import ConfigError
from dsmoe.diffusion.schedules import work_dtype


def classifier_free(
    model_with_y: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    null_label: int,
    scale: float,
    channels: int | str = 3,
) -> Callable[[Tensor, Tensor], Tensor]:
    """model(x, t) whose prediction is uncond + scale * (cond - uncond) on the guided channels.

    model_with_y(x [B,C,...], t [B], y [B]) -> [B, C or 2C, ...]; y int64 [B] class labels. The batch is
    doubled, first half y, second half null_label; scale 1 asks the model once, undoubled.
    channels: how many leading state channels are guided, "all" for every one. 3 of 4 is what published DiT
    numbers use (contracts 2.1.8). The other state channels and the variance channels are those of the
    conditional half. Result in x's work precision (fp32 or fp64). ConfigError: channels not "all" or above 0.
    """
    if channels != "all" and (isinstance(channels, (str, bool)) or channels < 1):
        raise ConfigError(f"cfg_channels is {channels!r}; give 'all' or a count of at least 1 (published DiT: 3).")

    def guided(x: Tensor, t: Tensor) -> Tensor:
        labels = y.to(x.device)
        if scale == 1:
            return model_with_y(x, t, labels).to(work_dtype(x))
        both = torch.cat([labels, torch.full_like(labels, null_label)])
        output = model_with_y(torch.cat([x, x]), torch.cat([t, t]), both).to(work_dtype(x))
        conditional, unconditional = output.chunk(2)
        # Never past the state: the variance channels behind it are unguided, however few channels there are.
        count = x.shape[1] if channels == "all" else min(channels, x.shape[1])
        start = unconditional[:, :count]
        mixed = start + scale * (conditional[:, :count] - start)
        return torch.cat([mixed, conditional[:, count:]], dim=1)

    return guided
