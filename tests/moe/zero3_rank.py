"""Run by every rank of test_zero3: trains two stacked MoE layers built under zero.Init and prints what it saw."""

import json
import sys

import deepspeed
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dsmoe.base.presets import ModelSpec
from dsmoe.moe import MoE
from dsmoe.training.deepspeed_patches import skip_shm_op

STEPS, BATCH, LR = 3, 8, 1e-3


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        spec = ModelSpec(depth=1, dim=16, heads=1, num_experts=3, expert_kind=kind, shared_ratio=2.0)
        self.layers = nn.ModuleList(MoE(spec) for _ in range(2))

    def forward(self, x):
        losses = 0.0
        for layer in self.layers:
            y, stats = checkpoint(layer, x, use_reentrant=False)
            x, losses = x + y, losses + 0.01 * stats.balance_loss + 0.001 * stats.z_loss
        return x, losses


def loss_of(net, x):
    y, losses = net(x)
    return (y.float() - 0.5 * x.float()).square().mean() + losses


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, 6, 16, generator=generator) for _ in range(STEPS)]


def plain(kind: str) -> list[float]:
    torch.manual_seed(0)
    net = Net(kind)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for x in batches():
        loss = loss_of(net, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def zero3(kind: str, bf16: bool) -> dict:
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    config = {
        "train_micro_batch_size_per_gpu": BATCH // world,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.0, "torch_adam": True}},
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        # Without a threshold small parameters would never be partitioned.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config):
        net = Net(kind)
    engine = deepspeed.initialize(model=net, model_parameters=list(net.parameters()), config=config)[0]
    losses = []
    for x in batches():
        mine = x.chunk(world)[rank].to(torch.bfloat16 if bf16 else torch.float32)
        loss = loss_of(engine, mine)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / world)
    return {
        "losses": losses,
        "held": {name: p.numel() for name, p in net.named_parameters() if p.numel()},
        "previous_load": [net.layers[0].previous_load.dtype == torch.float32, net.layers[0].previous_load.tolist()],
    }


if __name__ == "__main__":
    skip_shm_op()
    deepspeed.init_distributed("gloo")
    results = {}
    for kind in sys.argv[1:]:
        results[kind] = {"plain": plain(kind), "float32": zero3(kind, False), "bfloat16": zero3(kind, True)}
    if torch.distributed.get_rank() == 0:
        print("RESULT", json.dumps(results))
