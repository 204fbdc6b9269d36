"""Run by every rank: trains tiny models one step under DeepSpeed and saves with its own save_checkpoint.

deepspeed_folders.py FOLDER. For every cell FOLDER/<cell> is a checkpoint folder, FOLDER/<cell>.safetensors the fp32
weights that it must hold, as the engine itself shows them.
"""

import dataclasses
import functools
import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.checkpoint import autoep_affine, constants
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from dsmoe.base.presets import ModelSpec
from dsmoe.models.dit import DiT
from dsmoe.moe.deepspeed_layer import ExpertParallelMoE, create_groups
from dsmoe.runtime import distributed
from dsmoe.runtime.device import Device
from dsmoe.training.deepspeed_patches import skip_shm_op

SPEC = ModelSpec(depth=2, dim=16, heads=2, patch=2, conditions=1, tasks=2)
SIDE, CHANNELS, CLASSES = 4, 4, 5
BF16 = {"bf16": {"enabled": True}}
# Odd sizes of partitions and sub-groups, so that every seam is inside a tensor somewhere.
MOE = dataclasses.replace(SPEC, tasks=0, conditions=0, num_experts=4, shared_ratio=1.0)
CELLS = {
    "z0": (0, {}),
    "z1": (1, {}),
    "z2_bf16": (2, BF16),
    "z3_bf16": (3, {"sub_group_size": 3000, "stage3_param_persistence_threshold": 300, **BF16}),
    "z1_ep2": (1, {}),
}


class Published(DiT):
    """Ours as published code has it: the position embedding is a frozen parameter."""

    def __init__(self) -> None:
        super().__init__(SPEC, input_size=SIDE, in_channels=CHANNELS, num_classes=CLASSES, learn_sigma=True)
        table = self.pos_embed.clone()
        del self.pos_embed
        del self._fixed_values["pos_embed"]
        self.pos_embed = torch.nn.Parameter(table, requires_grad=False)


class Described(ExpertParallelMoE):
    """The layer with what DeepSpeed's own AutoEP puts on it to save it (expert_parallelism.md 3b-2)."""

    def __init__(self, spec: ModelSpec, **options: object) -> None:
        super().__init__(spec, **options)
        place = autoep_affine.legacy_uniform_autoep_placement_descriptor(
            spec.num_experts, self.num_local_experts, self.ep_size
        )
        self.expert_placement_descriptor = place
        for parameter in self.experts.parameters():
            whole = [spec.num_experts, *parameter.shape[1:]]
            affine = autoep_affine.autoep_placement_to_affine_map(place, whole).to_dict()
            setattr(parameter, constants.DS_AUTOEP_UC_META, {constants.AFFINE_MAP: affine})


def new_model(name: str) -> torch.nn.Module:
    if not name.endswith("ep2"):
        return Published()
    layer = functools.partial(Described, expert_groups=create_groups(2))
    return DiT(MOE, input_size=SIDE, in_channels=CHANNELS, num_classes=CLASSES, learn_sigma=True, moe_cls=layer)


def config(stage: int, extra: dict) -> dict:
    extra = dict(extra)
    engine = {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 4, "zero_allow_untested_optimizer": True}
    engine |= {key: extra.pop(key) for key in list(extra) if key == "bf16"}
    return engine | {"zero_optimization": {"stage": stage, "reduce_bucket_size": 20000, **extra}}


def full(engine: object, parameter: torch.nn.Parameter, stage: int) -> torch.Tensor:
    """The fp32 master of a parameter; a frozen one has none."""
    if stage == 0:
        return parameter.detach().float()
    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter).clone()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().float().clone()


def make(folder: Path, name: str, stage: int, extra: dict) -> None:
    torch.manual_seed(0)
    settings = config(stage, extra)
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=stage == 3):
        model = new_model(name)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[::2]}, {"params": trained[1::2], "weight_decay": 0.0}]
    if name.endswith("ep2"):
        experts = [p for p in trained if hasattr(p, "group_name")]
        others = [p for p in trained if not hasattr(p, "group_name")]
        groups = [{"params": others, "name": "others"}, {"params": experts, "moe": True, "name": experts[0].group_name}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    rank = distributed.rank()
    generator = torch.Generator().manual_seed(rank)
    channels = engine.module.in_channels
    x = torch.randn(2, channels, SIDE, SIDE, generator=generator).to(engine.get_data_types()[0])
    # The ranks meet different tasks: every convolution is still asked for everywhere.
    out, _ = engine(x, torch.tensor([3, 900]), torch.full((2,), CLASSES - 1 - rank))
    engine.backward(out.float().square().mean() + out.float().mean())
    engine.step()
    engine.save_checkpoint(str(folder / name))
    state = {key: whole(engine, p, stage) for key, p in engine.module.named_parameters()}
    if rank == 0:
        save_file(state, folder / f"{name}.safetensors")
    engine.destroy()


def whole(engine: object, parameter: torch.nn.Parameter, stage: int) -> torch.Tensor:
    """`full`, of all ranks' experts."""
    if not hasattr(parameter, "group_name"):
        return full(engine, parameter, stage).contiguous()
    mine = parameter.detach().float().contiguous()
    return torch.cat([part.float() for part in distributed.all_gather_tensor(mine)])


def main() -> None:
    distributed.initialize(distributed.discover(os.environ), Device("cpu"))
    skip_shm_op()
    for name, (stage, extra) in CELLS.items():
        make(Path(sys.argv[1]), name, stage, extra)
    distributed.shutdown()


if __name__ == "__main__":
    main()
