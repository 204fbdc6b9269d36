"""Run alone: trains a tiny model a few steps with every ds_config file named on the command line, in one process.

Prints one JSON line a file: losses, those of a bare torch loop, and which parameters moved. Its own loss, data and
model, so that nothing but policy, engine and optimizer is looked at.
"""

import dataclasses
import json
import os
import sys

import torch

from dsmoe.base.presets import ModelSpec
from dsmoe.base.recipe import OptimizerSpec
from dsmoe.ds_config import check_policy, engine_config, load_policy, resolve_batch
from dsmoe.models.dit import DiT
from dsmoe.runtime import distributed
from dsmoe.runtime.device import Device
from dsmoe.training.deepspeed_patches import skip_shm_op
from dsmoe.training.engine import Engine
from dsmoe.training.optimizer import build_optimizer, choose_implementation

STEPS, ACCUMULATED, CLIP = 5, 2, 0.1
SPEC = ModelSpec(depth=2, dim=32, heads=2, num_experts=4, shared_ratio=2.0)


def new_model():
    torch.manual_seed(0)
    model = DiT(SPEC, input_size=4, in_channels=4, num_classes=5, learn_sigma=False)
    model.initialize()
    return model


def loss_of(output, target):
    return (output.float() - target).square().mean()


def train_bare(spec, inputs, steps):
    """Losses of the same steps in fp32 torch, each on one micro-batch (accumulated gradients would be equal)."""
    model, losses = new_model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=0.0)
    for _ in range(steps):
        loss = loss_of(model(*inputs)[0], inputs[0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(file):
    policy = load_policy(file)
    if policy.offload_optimizer:  # DeepSpeed's CPU Adam would be compiled first, for a minute
        policy = dataclasses.replace(policy, block=dataclasses.replace(policy.block, optimizer="torch"))
    check_policy(policy, device_type="cpu", num_experts=SPEC.num_experts, world_size=1)
    micro = policy.micro_batch or 4
    batch = resolve_batch(policy, micro * (ACCUMULATED if policy.micro_batch else 1), 1)
    model = new_model()
    model.activation_checkpointing = policy.block.activation_checkpointing
    spec = OptimizerSpec(lr=1e-2, clip=CLIP)
    implementation = choose_implementation(policy.block.optimizer, device_type="cpu", offload=policy.offload_optimizer)
    optimizer = build_optimizer(list(model.parameters()), spec, implementation)
    engine = Engine(model, optimizer, engine_config(policy, batch, spec))
    before = [f.tensor.clone() for f in engine.fragments()]
    torch.manual_seed(1)
    inputs = torch.randn(micro, 4, 4, 4), torch.arange(micro) * 10.0, torch.arange(micro) % 5
    losses, norms = [], []
    for _ in range(STEPS * batch.accumulation):
        output, _ = engine(inputs[0].to(engine.dtype), *inputs[1:])
        loss = loss_of(output, inputs[0])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(engine.gradient_norm())
    after = engine.fragments()
    moved = [f.name for f, old in zip(after, before, strict=True) if not torch.equal(f.tensor, old)]
    engine.engine.destroy()
    return {
        "losses": losses[:: batch.accumulation], "bare": train_bare(spec, inputs, STEPS), "stage": engine.stage,
        "clipped": any(norm > CLIP for norm in norms), "dtype": str(engine.dtype), "accumulation": batch.accumulation,
        "all": [name for name, _ in model.named_parameters()], "moved": moved,
    }  # fmt: skip


def main():
    distributed.initialize(distributed.discover(os.environ), Device("cpu"))
    skip_shm_op()
    for file in sys.argv[1:]:
        print("FILE " + json.dumps(train(file)), flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
