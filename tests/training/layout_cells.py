"""Run by every rank: trains tiny models under DeepSpeed in many layouts and compares with a bare torch loop.

The oracle shares the model class and the drawing by index, and nothing else: one process, the whole global batch
at once, torch.optim.AdamW, clip_grad_norm_, and an average kept by hand. Prints one JSON line a cell on rank 0.
"""

import json
import os
import sys

import torch

from dsmoe.base.recipe import recipe_from_dict
from dsmoe.codec.protocol import Posterior
from dsmoe.data.order import micro_batch
from dsmoe.diffusion.objective import Objective
from dsmoe.diffusion.schedules import make_schedule
from dsmoe.models.dit import DiT
from dsmoe.preprocess.memory import LatentBatch
from dsmoe.runtime import distributed
from dsmoe.runtime.device import Device
from dsmoe.tasks.class_conditional import ClassConditional
from dsmoe.training.deepspeed_patches import skip_shm_op
from dsmoe.training.ema import Ema
from dsmoe.training.engine import Engine, gather_full
from dsmoe.training.health import GradientWatch
from dsmoe.training.loop import Training, take_step
from dsmoe.training.optimizer import build_optimizer, learning_rate

STEPS = int(os.environ.get("LAYOUT_STEPS", "6"))
GLOBAL, CLASSES, SIDE = 8, 5, 4
SPECS = {
    "dense": {"depth": 2, "dim": 32, "heads": 2, "patch": 2},
    "moe": {"depth": 2, "dim": 32, "heads": 2, "patch": 2, "num_experts": 4, "shared_ratio": 2.0},
    "gelu": {
        "depth": 2,
        "dim": 32,
        "heads": 2,
        "patch": 2,
        "num_experts": 4,
        "expert_kind": "gelu",
        "renormalize": True,
    },
}


class _Plan:
    """The two sections of a plan that the loop reads."""

    def __init__(self, recipe, accumulation):
        self.recipe = recipe
        self.engine = type("E", (), {"accumulation": accumulation})


def recipe(kind, scope):
    return recipe_from_dict(
        {
            "name": "cell",
            "model": SPECS[kind],
            "optimizer": {"lr": 3e-3, "clip": 0.5, "weight_decay": 0.01, "warmup_images": 16},
            "balance": {"scope": scope, "coefficient": 0.05, "z_coefficient": 0.001},
            "train": {"images": STEPS * GLOBAL, "global_batch": GLOBAL, "seed": 3},
        }
    )


def new_model(science):
    torch.manual_seed(1)
    model = DiT(
        science.model,
        input_size=SIDE,
        in_channels=4,
        num_classes=CLASSES,
        learn_sigma=True,
        balance_scope=science.balance.scope,
    )
    for p in model.parameters():  # adaLN-Zero would leave most gradients at zero in so few steps
        p.data.add_(0.05 * torch.randn_like(p))
    return model


def latents(index):
    """The data: latents that depend on the sample index alone."""
    generator = torch.Generator().manual_seed(7)
    table = torch.randn(64, 4, SIDE, SIDE, generator=generator)
    mean = table[index % 64]
    return LatentBatch(Posterior(mean, 0.1 * torch.ones_like(mean)), index % CLASSES, index, index)


def train_reference(science):
    model = new_model(science)
    shadow = [p.detach().clone() for p in model.parameters()]
    spec, balance = science.optimizer, science.balance
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay
    )
    objective = Objective(make_schedule("linear", 1000), "epsilon", "learned_range")
    task = ClassConditional(num_classes=CLASSES, label_dropout=0.1, seed=science.train.seed)
    losses, norms = [], []
    for step in range(STEPS):
        batch = latents(torch.arange(step * GLOBAL, (step + 1) * GLOBAL))
        inputs = task.training_inputs(batch.posterior, batch.labels, batch.index, 1000)
        x_t = objective.corrupt(inputs.x0, inputs.t, inputs.noise)
        output, stats = model(x_t, inputs.t.float(), inputs.y)
        loss = objective.training_loss(output, inputs.x0, x_t, inputs.t, inputs.noise).total.mean()
        if stats is not None:
            loss = loss + balance.coefficient * stats.balance_loss + balance.z_coefficient * stats.z_loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip).item())
        rate = learning_rate(spec, step * GLOBAL, science.train.images)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        if stats is not None and balance.scope == "step":
            for block, load in zip(model.blocks, stats.load, strict=True):
                block.moe.update_previous_load(load)
        shadow = [s + (p.detach() - s) * 0.1 for s, p in zip(shadow, model.parameters(), strict=True)]
        losses.append(loss.item())
    names = [n for n, _ in model.named_parameters()]
    return losses, norms, dict(model.named_parameters()), dict(zip(names, shadow, strict=True))


def new_run(science, stage, accumulation, checkpointing, start=0, **config):
    """A Training over steps from `start` on under DeepSpeed; `config` goes over the engine's configuration."""
    world, rank = distributed.world_size(), distributed.rank()
    micro = GLOBAL // world // accumulation
    config = {
        "train_batch_size": GLOBAL,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": science.optimizer.clip,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 20000,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 20000,
        },
        "steps_per_print": 10**9,
        **config,
    }
    model = new_model(science)
    model.activation_checkpointing = checkpointing
    engine = Engine(model, build_optimizer(list(model.parameters()), science.optimizer, "torch_fused"), config)
    return Training(
        plan=_Plan(science, accumulation),
        engine=engine,
        ema=Ema(engine, {"ema": 0.9}),
        batches=(
            latents(micro_batch(step, a, rank, world, micro, GLOBAL))
            for step in range(start, STEPS)
            for a in range(accumulation)
        ),
        codec=None,
        objective=Objective(make_schedule("linear", 1000), "epsilon", "learned_range"),
        task=ClassConditional(num_classes=CLASSES, label_dropout=0.1, seed=science.train.seed),
        watch=GradientWatch(engine.model.x_embedder, torch.device("cpu")),
        telemetry=None,
        sheets=None,
        device=torch.device("cpu"),
    )


def take_steps(run, steps):
    """Losses and gradient norms of these steps."""
    losses, norms = [], []
    for step in steps:
        report = take_step(run, step)
        run.ema.update()
        losses.append(report.figures[:, 0].mean().item())
        norms.append(report.figures[0, 6].item())
    return losses, norms


def train_cell(science, stage, accumulation, checkpointing):
    run = new_run(science, stage, accumulation, checkpointing)
    losses, norms = take_steps(run, range(STEPS))
    engine, ema = run.engine, run.ema
    replicated = stage == 0
    weights = gather_full(engine.fragments(), engine.shapes(), replicated)
    average = gather_full(ema.fragments, engine.shapes(), replicated)
    own = sum(f.tensor.numel() for f in ema.fragments)
    engine.engine.destroy()
    return losses, norms, weights, average, own


def without_key_bias(name, tensor):
    """qkv.bias without its K third, whose true gradient is zero: softmax ignores a shift of all keys.

    AdamW turns the rounding noise there into full-size steps; the design's invariance statement lists it.
    """
    if not name.endswith("attn.qkv.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


def relative(found, truth):
    """Largest ||d|| / ||p|| over parameters."""
    worst = 0.0
    for name in truth:
        a, b = without_key_bias(name, found[name]), without_key_bias(name, truth[name].detach())
        worst = max(worst, ((a - b).norm() / b.norm().clamp_min(1e-12)).item())
    return worst


def main():
    distributed.initialize(distributed.discover(os.environ), Device("cpu"))
    skip_shm_op()
    references = {}
    for kind, scope, stage, accumulation, checkpointing in json.loads(sys.argv[1]):
        science = recipe(kind, scope)
        if (kind, scope) not in references:
            references[kind, scope] = train_reference(science)
        losses, norms, weights, average = references[kind, scope]
        found = train_cell(science, stage, accumulation, checkpointing)
        cell = {
            "cell": [kind, scope, stage, accumulation, checkpointing],
            "loss": max(abs(a - b) / abs(b) for a, b in zip(found[0], losses, strict=True)),
            "norm": max(abs(a - b) / b for a, b in zip(found[1], norms, strict=True)),
            "weights": relative(found[2], weights),
            "average": relative(found[3], average),
            "moved": relative(average, dict(new_model(science).named_parameters())),
            "clipped": sum(n > science.optimizer.clip for n in norms),
            "own": found[4],
            "all": sum(p.numel() for p in weights.values()),
        }
        if distributed.is_main():
            print("CELL " + json.dumps(cell), flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
