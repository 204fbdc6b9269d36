"""AdamW in the implementation that the machine offers, and the learning rate as a function of images seen."""

import importlib.util
import os

import torch

from dsmoe.base.errors import ConfigError
from dsmoe.base.recipe import OptimizerSpec
from dsmoe.runtime import extension_cache
from dsmoe.runtime.logging import get_logger


def choose_implementation(requested: str, *, device_type: str, offload: bool) -> str:
    """One of torch, torch_fused, cpu_adam, apex; ConfigError when the requested one is not installed."""
    has_apex = device_type == "cuda" and importlib.util.find_spec("apex") is not None
    if requested == "apex" and not has_apex:
        raise ConfigError("dsmoe.optimizer is apex, but apex with a GPU was not found; use auto or torch_fused.")
    if requested != "auto":
        return requested
    if offload:
        return "cpu_adam"
    return "apex" if has_apex else "torch_fused"


def build_optimizer(
    parameters: list[torch.nn.Parameter], spec: OptimizerSpec, implementation: str
) -> torch.optim.Optimizer:
    """AdamW over `parameters`. Every implementation computes the same decoupled update.

    Experts that other ranks lack stand in a group of their own, which DeepSpeed's ZeRO 1 and 2 ask for.
    """
    groups = [{"params": [p for p in parameters if not hasattr(p, "expert_group")], "name": "all"}]
    experts = [p for p in parameters if hasattr(p, "expert_group")]
    if experts:
        groups.append({"params": experts, "name": experts[0].group_name, "moe": True})
    settings = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps, "weight_decay": spec.weight_decay}
    if implementation == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        # Its extension is compiled at first use, behind a lock on which torch waits for ever.
        cache = extension_cache.use_own_folder(os.environ)
        extension_cache.wait_until_loadable(cache, "cpu_adam", on_wait=get_logger("optimizer").info)
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    if implementation == "apex":
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=implementation == "torch_fused", **settings)


def learning_rate(spec: OptimizerSpec, images_seen: int, total_images: int) -> float:
    """Rate for the step that starts at `images_seen`.

    Linear warm-up reaches `lr` at warmup_images; `exponential` then decays to lr * final_ratio at total_images:
    lr * final_ratio ** (n / N) with n, N counted from the end of the warm-up (contracts 4.7).
    """
    if images_seen < spec.warmup_images:
        return spec.lr * images_seen / spec.warmup_images
    if spec.schedule == "constant":
        return spec.lr
    progress = (images_seen - spec.warmup_images) / max(total_images - spec.warmup_images, 1)
    return spec.lr * spec.final_ratio ** min(progress, 1.0)
