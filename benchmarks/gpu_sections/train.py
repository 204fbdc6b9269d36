"""A training step: our model under plain bf16 weights, fp32 masters, fused AdamW and an average, without DeepSpeed.

What the engine adds beside a bare loop is benchmarks/train_step.py's question.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from dsmoe.base.accounting import TRAINING_FLOPS_PER_MAC, count_macs
from dsmoe.base.presets import ModelSpec, preset
from dsmoe.models.dit import DiT
from dsmoe.runtime.device import Device
from gpu_sections.rates import PRODUCT, rate
from gpu_sections.settings import Settings, first_line

CHANNELS, CLASSES = 4, 1000
# preset, blocks (all, or so many that weights and moments leave room), latent side, images a step
MODELS = (("S/2-8E2A", None, 32, 128), ("L/2-8E2A", 6, 32, 128))
WARM, STEPS = 3, 10


def run(settings: Settings) -> Iterator[dict]:
    """A row a model; on a CPU a tiny one."""
    for name, depth, side, images in (("nano-4E2A", 1, 8, 4),) if settings.quick else MODELS:
        spec = preset(name) if depth is None else dataclasses.replace(preset(name), depth=depth)
        row = {"preset": name, "depth": spec.depth, "images": images, "tokens": images * (side // spec.patch) ** 2}
        try:
            yield {**row, **measure(spec, side, images, settings)}
        except RuntimeError as error:
            yield {**row, "error": first_line(error)}


def measure(spec: ModelSpec, side: int, images: int, settings: Settings) -> dict:
    """Seconds of each step, FLOPs of one, peak memory."""
    device = Device(settings.device)
    step = _training(spec, side, images, settings)
    for _ in range(1 if settings.quick else WARM):
        step()
    device.reset_max_memory()
    seconds = []
    for _ in range(2 if settings.quick else STEPS):
        device.synchronize()
        begun = time.perf_counter()
        step()
        device.synchronize()
        seconds.append(time.perf_counter() - begun)
    macs = count_macs(spec, channels=CHANNELS, input_size=side, learn_sigma=True).total
    return {
        "seconds": seconds,
        "flops": TRAINING_FLOPS_PER_MAC * macs * images,
        "peak_bytes": device.max_memory_bytes() if settings.device == "cuda" else None,
        "datasheet": device.peak_flops(torch.bfloat16),
    }


def _training(spec: ModelSpec, side: int, images: int, settings: Settings) -> Callable[[], None]:
    """One step over a fixed batch: forward, backward, clipping, AdamW in fp32, average, weights rounded to bf16."""
    place = settings.torch_device
    torch.manual_seed(0)
    model = DiT(spec, input_size=side, in_channels=CHANNELS, num_classes=CLASSES, learn_sigma=True)
    model = model.to(place).bfloat16()
    stored = list(model.parameters())
    masters = [p.detach().float() for p in stored]
    averages = [m.clone() for m in masters]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, weight_decay=0.0, fused=True)
    x = torch.randn(images, CHANNELS, side, side, device=place).bfloat16()
    noise = torch.randn_like(x).float()
    t, y = (torch.randint(0, CLASSES, (images,), device=place) for _ in range(2))

    def step() -> None:
        output, stats = model(x, t, y)
        loss = (output[:, :CHANNELS].float() - noise).square().mean()
        if stats is not None:
            loss = loss + 0.01 * stats.balance_loss
        loss.backward()
        for master, weight in zip(masters, stored, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(stored, masters)
            torch._foreach_lerp_(averages, masters, 1e-4)

    return step


def table(rows: list[dict], every: dict) -> list[str]:
    """Markdown."""
    product = rate(every, PRODUCT)
    shown = [
        "| model | blocks | images | ms a step | images/s | tokens/s | TFLOP/s | MFU | matmul fraction | peak, GiB |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        head = f"| {row['preset']} | {row['depth']} | {row['images']} | "
        if "error" in row:
            shown.append(head + f"failed: {row['error']} |" + " |" * 6)
            continue
        seconds = statistics.median(row["seconds"])
        speed = row["flops"] / seconds
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
        shown.append(
            head + f"{1e3 * seconds:.1f} | {row['images'] / seconds:.1f} | {row['tokens'] / seconds:.0f} | "
            f"{speed / 1e12:.4g} | {_percent(speed, row['datasheet'])} | {_percent(speed, product)} | {peak} |"
        )
    return shown


def _percent(speed: float, most: float | None) -> str:
    return "-" if most is None else f"{100 * speed / most:.1f} %"
