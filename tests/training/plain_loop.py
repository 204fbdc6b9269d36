"""The oracle of the layout tests: tiny models, their data, and one bare torch training loop without DeepSpeed.

It shares the model class, the objective and the random numbers by index with the code under test, and nothing of the
task, the engine, the averages or the loop: torch.optim.AdamW over copies of the weights in fp32 or fp64,
clip_grad_norm_, averages kept by hand. One process at once, or plain data parallel with gradients averaged by hand.
"""

import os
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from router_choices import Choices, Decisions

from dsmoe.base.presets import ModelSpec
from dsmoe.base.recipe import recipe_from_dict
from dsmoe.codec.protocol import Posterior
from dsmoe.data.order import micro_batch
from dsmoe.diffusion.objective import Objective
from dsmoe.diffusion.schedules import make_schedule
from dsmoe.models.dit import DiT
from dsmoe.moe import MoE
from dsmoe.ops import random
from dsmoe.preprocess.memory import LatentBatch
from dsmoe.runtime import distributed
from dsmoe.tasks.class_conditional import ClassConditional
from dsmoe.training.optimizer import learning_rate

STEPS = int(os.environ.get("LAYOUT_STEPS", "6"))
GLOBAL, CLASSES, SIDE, LABEL_DROPOUT = 8, 5, 4, 0.1
DECAYS = {"ema": 0.9, "ema_2": 0.5}
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
    # Every token goes to the first expert (new_model), so that most have none, on all ranks and through all steps.
    "lone": {"depth": 2, "dim": 32, "heads": 2, "patch": 2, "num_experts": 4, "top_k": 1, "shared_ratio": 2.0},
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


class Cut(NamedTuple):
    """How a global batch is laid out; without arguments one process that sees the whole batch at once."""

    rank: int = 0
    world: int = 1
    accumulation: int = 1

    def indices(self, step: int) -> list[torch.Tensor]:
        """The sample indices of this rank's micro-batches."""
        micro = GLOBAL // self.world // self.accumulation
        return [micro_batch(step, a, self.rank, self.world, micro, GLOBAL) for a in range(self.accumulation)]


@dataclass
class State:
    """Everything that a step changes, whole tensors by parameter name: what a checkpoint must hold.

    previous_load, selection_bias: of every expert layer; no biases where the run balances by losses.
    """

    master: dict[str, torch.Tensor]
    exp_avg: dict[str, torch.Tensor]
    exp_avg_sq: dict[str, torch.Tensor]
    averages: dict[str, dict[str, torch.Tensor]]
    optimizer_steps: int
    previous_load: list[torch.Tensor]
    selection_bias: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Trained:
    """What a run leaves behind, for comparison: figures of every step, final weights and averages, choices."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    averages: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    choices: Decisions | None = None
    biases: list[torch.Tensor] = field(default_factory=list)


def recipe(kind, scope, seed=3, bias_rate=0.0):
    return recipe_from_dict(
        {
            "name": "cell",
            "model": SPECS[kind],
            "optimizer": {"lr": 3e-3, "clip": 0.5, "weight_decay": 0.01, "warmup_images": 16},
            "balance": {"scope": scope, "coefficient": 0.05, "z_coefficient": 0.001, "bias_rate": bias_rate},
            "train": {"images": STEPS * GLOBAL, "global_batch": GLOBAL, "seed": seed},
        }
    )


def new_model(science, moe_cls=MoE):
    torch.manual_seed(science.train.seed)
    model = DiT(
        science.model,
        input_size=SIDE,
        in_channels=4,
        num_classes=CLASSES,
        learn_sigma=True,
        balance_scope=science.balance.scope,
        selection_bias=science.balance.bias_rate > 0,
        moe_cls=moe_cls,
    )
    for p in model.parameters():  # adaLN-Zero would leave most gradients at zero in so few steps
        p.data.add_(0.05 * torch.randn_like(p))
    if science.model == ModelSpec(**SPECS["lone"]):
        for bias in selection_biases(model):
            bias[0] = 2.0  # above every probability, for as long as a test trains
    return model


def latents(index, dtype=torch.float32):
    """The data: latents that depend on the sample index alone, drawn in fp32 and cast."""
    generator = torch.Generator().manual_seed(7)
    table = torch.randn(64, 4, SIDE, SIDE, generator=generator)
    mean = table[index % 64].to(dtype)
    return LatentBatch(Posterior(mean, 0.1 * torch.ones_like(mean)), index % CLASSES, index, index)


def objective():
    return Objective(make_schedule("linear", 1000), "epsilon", "learned_range")


def task(science):
    return ClassConditional(
        num_classes=CLASSES, label_dropout=LABEL_DROPOUT, seed=science.train.seed, diffusion=science.diffusion
    )


def samples(steps):
    """The global sample indices of these steps."""
    return range(steps.start * GLOBAL, steps.stop * GLOBAL)


def train_plain(science, dtype=torch.float32, cut=None, steps=None, start=None, skip=None):
    """Train `steps` from `start` (a State; without one from the beginning) with weights stored as `dtype`.

    Master weights, gradients after their averaging, moments and averages are fp64 for fp64, else fp32. The step `skip`
    changes nothing and has no gradient norm, as where a loss scaler finds an overflow.
    """
    cut, steps = cut or Cut(), steps or range(STEPS)
    model = new_model(science).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    choices = Choices(model)
    names, stored = zip(*model.named_parameters(), strict=True)
    weights = [torch.nn.Parameter(p.detach().to(wide, copy=True)) for p in stored]
    spec = science.optimizer
    optimizer = torch.optim.AdamW(weights, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay)
    averages = {kind: [w.detach().clone() for w in weights] for kind in DECAYS}
    if start is not None:
        _restore(start, names, weights, optimizer, averages, model)
    found = Trained()
    for step in steps:
        for p, w in zip(stored, weights, strict=True):
            p.data.copy_(w.detach())
        found.losses.append(_global_loss(science, model, choices, cut, step, dtype, step != skip))
        for p, w in zip(stored, weights, strict=True):
            w.grad, p.grad = _mean(p.grad.to(wide), cut), None
        if step == skip:
            continue
        found.norms.append(torch.nn.utils.clip_grad_norm_(weights, spec.clip).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, step * GLOBAL, science.train.images)
        optimizer.step()
        for kind, decay in DECAYS.items():
            averages[kind] = [a + (w.detach() - a) * (1 - decay) for a, w in zip(averages[kind], weights, strict=True)]
    found.weights = {n: w.detach() for n, w in zip(names, weights, strict=True)}
    found.averages = {kind: dict(zip(names, tensors, strict=True)) for kind, tensors in averages.items()}
    found.choices = choices.decisions(samples(steps), shared=cut.world > 1)
    found.biases = [bias.clone() for bias in selection_biases(model)]
    return found


def selection_biases(model):
    """Of every expert layer that has one; the buffers themselves."""
    moes = [block.moe for block in model.blocks if block.is_moe]
    return [moe.selection_bias for moe in moes if moe.selection_bias is not None]


def _global_loss(science, model, choices, cut, step, dtype, balances):
    """Forward and backward of a rank's part of a global batch; the loss of the whole of it. Then the routers' memory
    of the load moves, if `balances`."""
    balance, seed, loss_of = science.balance, science.train.seed, objective()
    total, load = torch.zeros((), dtype=torch.float64), None
    for index in cut.indices(step):
        choices.begin(index)
        batch = latents(index, torch.promote_types(dtype, torch.float32))
        x0 = batch.posterior.sample(random.normal(seed, "posterior", index, (4, SIDE, SIDE)))
        noise = random.normal(seed, "noise", index, (4, SIDE, SIDE)).to(x0)
        t = random.randint(seed, "timestep", index, 1000)
        y = torch.where(random.uniform(seed, "label_drop", index) < LABEL_DROPOUT, CLASSES, batch.labels)
        x_t = loss_of.corrupt(x0, t, noise)
        output, stats = model(x_t.to(dtype), t.float(), y)
        loss = loss_of.training_loss(output, x0, x_t, t, noise).total.mean()
        if stats is not None:
            loss = loss + balance.coefficient * stats.balance_loss + balance.z_coefficient * stats.z_loss
            load = stats.load.double() / cut.accumulation + (0 if load is None else load)
        (loss / cut.accumulation).backward()
        total += loss.detach().double() / cut.accumulation
    if load is not None and balances:
        for block, of_layer in zip(model.blocks, _mean(load, cut), strict=True):
            if balance.scope == "step":
                block.moe.update_previous_load(of_layer)
            if balance.bias_rate:
                slots = GLOBAL * model.tokens * model.spec.top_k
                _move_bias(block.moe.selection_bias, of_layer, slots, balance.bias_rate)
    return _mean(total, cut).item()


def _move_bias(bias, load, slots, rate):
    """Wang et al. 2024, algorithm 1, one expert at a time; load [E]: shares of the step's `slots` choices."""
    counts = [round(share * slots) for share in load.tolist()]
    assert sum(counts) == slots, counts
    for expert, count in enumerate(counts):
        if count * len(counts) != slots:
            bias[expert] += rate if count * len(counts) < slots else -rate


def _mean(tensor, cut):
    return distributed.all_reduce_(tensor, "mean") if cut.world > 1 else tensor


def _restore(start, names, weights, optimizer, averages, model):
    for name, w in zip(names, weights, strict=True):
        w.data.copy_(start.master[name])
        moments = {"exp_avg": start.exp_avg[name].clone(), "exp_avg_sq": start.exp_avg_sq[name].clone()}
        optimizer.state[w] = {"step": torch.tensor(float(start.optimizer_steps)), **moments}
    for kind in DECAYS:
        averages[kind] = [start.averages[kind][name].clone() for name in names]
    moes = [block.moe for block in model.blocks if block.is_moe]
    for moe, load in zip(moes, start.previous_load, strict=True):
        moe.update_previous_load(load)
    for bias, started in zip(selection_biases(model), start.selection_bias, strict=True):
        bias.copy_(started)
