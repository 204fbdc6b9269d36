"""How fast does each way of balancing experts mend a router that sends everything to one of them?

    PYTHONPATH=. python benchmarks/balance_recovery.py --folder DIR [--steps 300] [--write docs/balance.md]

A small DiT-MoE (4 blocks, 8 SwiGLU experts of which 2, a shared one) learns `scenes` latents of kl-small with its
gates turned towards expert 0 at the start. One run for each method and seed, all from the same weights and images of
the seed: no balancing; the loss of scope sample, micro and step; a selection bias without a loss. Recovered: the
busiest expert of every layer has had under twice its fair share in each of the last 10 steps. One CPU process
without DeepSpeed; finished runs are kept in the folder. Writes a plot beside the report.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

from dsmoe.base.diffusion import DiffusionSpec
from dsmoe.base.presets import preset
from dsmoe.codec import build as build_codec
from dsmoe.data.scenes import Scenes
from dsmoe.diffusion import make_objective
from dsmoe.models.dit import DiT
from dsmoe.moe.statistics import load_imbalance
from dsmoe.tasks.class_conditional import ClassConditional
from dsmoe.tasks.noising import Noising

ROOT = Path(__file__).resolve().parents[1]
SPEC = preset("nano-8E2A", depth=4)
RESOLUTION, IMAGES, BATCH, WINDOW, ENOUGH = 64, 1024, 32, 10, 2.0
PUSH = 4.0  # what turning adds to the logit of expert 0 for a mean token
METHODS = {
    "none": ("none", 0.0, 0.0),
    "sample, 0.01": ("sample", 0.01, 0.0),
    "micro, 0.01": ("micro", 0.01, 0.0),
    "step, 0.01": ("step", 0.01, 0.0),
    "bias, rate 0.01": ("none", 0.0, 0.01),
}
SEEDS = (0, 1, 2)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--write", type=Path, help="also write the report to this file, its plot beside it in images/")
    given = parser.parse_args(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    latents, labels = encode()
    runs = {}
    for seed in SEEDS:
        for name, method in METHODS.items():
            file = given.folder / f"{name.split(',')[0]}-{seed}-{given.steps}.json"
            if not file.exists():
                file.write_text(json.dumps(train(latents, labels, method, seed, given.steps)))
                print(f"{name}, seed {seed}: done", flush=True)
            runs[name, seed] = json.loads(file.read_text())
    text = table(runs)
    print(text)
    if given.write:
        picture = given.write.parent / "images" / "balance_recovery.png"
        draw(runs, picture)
        given.write.write_text(document(text, given.steps), encoding="utf-8")
    return 0


def encode() -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [N, C, h, w] and labels of the images."""
    scenes, codec = Scenes("train", RESOLUTION, IMAGES), build_codec("kl-small")
    pairs = [scenes.read(i) for i in range(IMAGES)]
    pixels = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _ in pairs]).float() / 127.5 - 1
    with torch.no_grad():
        latents = torch.cat([codec.encode(part).mean for part in pixels.split(128)])
    return latents, torch.tensor([label for _, label in pairs])


def train(latents: torch.Tensor, labels: torch.Tensor, method: tuple, seed: int, steps: int) -> dict:
    """One run: per step the loss without balancing terms, and the busiest expert's load of each layer over the mean."""
    scope, coefficient, rate = method
    torch.manual_seed(seed)
    classes = int(labels.max()) + 1
    model = DiT(
        SPEC, input_size=latents.shape[-1], in_channels=latents.shape[1], num_classes=classes, learn_sigma=False,
        balance_scope=scope, selection_bias=rate > 0,
    )  # fmt: skip
    diffusion = DiffusionSpec(learn_sigma=False, schedule="scaled_linear")
    objective = make_objective(diffusion)
    noising = Noising(diffusion, seed)
    task = ClassConditional(num_classes=classes, label_dropout=0.1, seed=seed, diffusion=diffusion)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    losses, busiest = [], []
    for step in range(steps):
        index = torch.arange(step * BATCH, (step + 1) * BATCH)
        x0, y = latents[index % IMAGES], task.labels(labels[index % IMAGES], index)
        t = noising.times(index)
        noise = noising.noise(index, x0.shape[1:], t)
        x_t = objective.corrupt(x0, t, noise)
        if step == 0:
            turn_to_expert_0(model, x_t, objective.model_time(t), y)
        output, stats = model(x_t, objective.model_time(t), y)
        loss = objective.training_loss(output, x0, x_t, t, noise).total.mean()
        optimizer.zero_grad()
        (loss + coefficient * stats.balance_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for block, load in zip(model.blocks, stats.load, strict=True):
            block.moe.update_previous_load(load)
            if rate:
                block.moe.update_selection_bias((load.double() * BATCH * model.tokens * SPEC.top_k).round(), rate)
        losses.append(loss.item())
        busiest.append(load_imbalance(stats.load).tolist())
    return {"losses": losses, "busiest": busiest, "commit": commit()}


@torch.no_grad()
def turn_to_expert_0(model: DiT, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> None:
    """Turn every gate's first row along the mean token that comes to it, block after block."""
    for block in model.blocks:
        seen: list[torch.Tensor] = []
        handle = block.moe.gate.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        model(x, t, y)
        handle.remove()
        mean = seen[0].mean(0)
        block.moe.gate.weight[0] += PUSH * mean / mean.square().sum()


def recovered(busiest: list[list[float]]) -> int | None:
    """Steps after which WINDOW steps in a row had every layer under ENOUGH; None if there were none."""
    worst = [max(layers) for layers in busiest]
    for step in range(WINDOW, len(worst) + 1):
        if max(worst[step - WINDOW : step]) < ENOUGH:
            return step
    return None


def table(runs: dict) -> str:
    """Markdown, one line a method."""
    lines = [
        f"| method | busiest at the start | steps until under {ENOUGH:g} x, seeds {', '.join(map(str, SEEDS))} | "
        "busiest, last 50 steps | loss, last 50 steps |",
        "|---|---|---|---|---|",
    ]
    for name in METHODS:
        mine = [runs[name, seed] for seed in SEEDS]
        steps = ", ".join(str(recovered(run["busiest"]) or "never") for run in mine)
        start = sum(max(run["busiest"][0]) for run in mine) / len(mine)
        end = sum(max(row) for run in mine for row in run["busiest"][-50:]) / (50 * len(mine))
        loss = [sum(run["losses"][-50:]) / 50 for run in mine]
        lines.append(f"| {name} | {start:.2f} x | {steps} | {end:.2f} x | {', '.join(f'{v:.4f}' for v in loss)} |")
    return "\n".join(lines)


def draw(runs: dict, path: Path) -> None:
    """The busiest expert of the worst layer against steps, every seed a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for color, name in zip(("0.5", "tab:blue", "tab:orange", "tab:green", "tab:red"), METHODS, strict=True):
        for seed in SEEDS:
            worst = [max(layers) for layers in runs[name, seed]["busiest"]]
            axes.plot(worst, color=color, linewidth=1, alpha=0.8, label=name if seed == SEEDS[0] else None)
    axes.axhline(ENOUGH, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="optimizer steps", ylabel="busiest expert / fair share, worst layer", ylim=(0.9, None))
    axes.set_title("A router turned to one of 8 experts (top 2), three seeds")
    axes.grid(alpha=0.3)
    axes.legend(title="balancing")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def commit() -> str:
    """The checkout's commit, marked when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def document(text: str, steps: int) -> str:
    """The report with what it was made of."""
    return f"""# Balancing experts

What each method is: `balance.*` in a recipe (`dsmoe/base/recipe.py`), formulas in `dsmoe/moe/balance.py`.

## From a router that sends everything to one expert

`PYTHONPATH=. python benchmarks/balance_recovery.py --folder DIR` on {date.today()}, commit {commit()}, Python
{platform.python_version()}, torch {torch.__version__}, one thread of {os.cpu_count()} CPU cores, {steps} steps of
{BATCH} images. {__doc__.split(chr(10), 4)[4].strip()}

{text}

![busiest expert against steps](images/balance_recovery.png)

With 8 experts and top 2 the busiest can have 4 x its share: every token.
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
