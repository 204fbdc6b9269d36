"""Training of our own KL autoencoder on pictures held in memory: one process, one thread is enough.

Every draw (which picture, flip, posterior noise) is counted by sample index, so a run that is stopped and resumed
is the same run. Not here: where the pictures come from and what is printed (launchers/train_codec.py).
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsmoe.base.errors import ConfigError
from dsmoe.codec.files import load_strict, read_safetensors
from dsmoe.codec.kl import CHANNELS, FACTOR, FORMAT, KLAutoencoder
from dsmoe.codec.quality import psnr
from dsmoe.ops import random

WEIGHTS_FILE = "kl_small.safetensors"
STATE_FILE = "state.safetensors"
_LARGE_EVERY = 4  # each 4th step sees pictures of twice the side, a quarter as many: as many pixels
_ADAM = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class FitOptions:
    """What decides the weights, besides the pictures.

    images: pictures to see, counted at the base side (one of twice the side counts as four); or
    minutes: wall time to use instead, which makes the schedule follow the clock the result not repeatable.
    """

    images: int | None = None
    minutes: float | None = None
    seed: int = 0
    batch: int = 16
    learning_rate: float = 2e-3
    warmup_images: int = 4_000
    l2_weight: float = 4.0
    edge_weight: float = 0.5
    kl_weight: float = 4e-3
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        if (self.images is None) == (self.minutes is None):
            raise ConfigError("give the length of the training in images or in minutes, one of the two")
        if (self.images if self.minutes is None else self.minutes) <= 0:
            raise ConfigError(f"length of the training is {self.images or self.minutes}, it must be positive")


@dataclass(frozen=True)
class Pictures:
    """uint8 [N, H, W, 3]: `base` and, with sides twice as long, `large`; `held_out` is like `base`."""

    base: Tensor
    large: Tensor
    held_out: Tensor

    def __post_init__(self) -> None:
        for name, factor in (("base", 1), ("large", 2), ("held_out", 1)):
            value = getattr(self, name)
            assert value.dtype == torch.uint8, name
            assert value.ndim == 4, name
            assert value.shape[1:3] == tuple(factor * side for side in self.base.shape[1:3]), name


@dataclass(frozen=True)
class Progress:
    """Images seen, share done in [0, 1], images/s, mean loss terms since the last report, held-out PSNR."""

    images: int
    share: float
    rate: float
    remaining_s: float
    losses: dict[str, float]
    psnr: float | None


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> fp32 [N, 3, H, W] in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1)


def reconstruction_terms(images: Tensor, outputs: Tensor) -> dict[str, Tensor]:
    """Means of |d|, d^2 and |gradient of d| (neighbour differences, both axes), d = outputs - images."""
    difference = outputs - images
    edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    return {"l1": difference.abs().mean(), "l2": difference.square().mean(), "edge": 0.5 * edges}


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Divergence of N(mean, exp(log_variance)) from N(0, 1) in nats, mean over latent elements."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


class Fitter:
    """The state of one training: network, its moving average, Adam moments, images seen."""

    def __init__(self, options: FitOptions, pictures: Pictures) -> None:
        self.options = options
        self.pictures = pictures
        self.images = 0
        self.elapsed_s = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.network = KLAutoencoder()
        self.average = KLAutoencoder().requires_grad_(False).eval()
        self.average.load_state_dict(self.network.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), options.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )

    @property
    def share(self) -> float:
        """Part of the training that is done, in [0, 1]."""
        if self.options.minutes is not None:
            return min(1.0, self.elapsed_s / (60 * self.options.minutes))
        return min(1.0, self.images / self.options.images)

    def _learning_rate(self) -> float:
        warm = min(1.0, (self.images + self.options.batch) / self.options.warmup_images)
        return self.options.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * self.share))

    def _batch(self) -> tuple[Tensor, Tensor]:
        """(images fp32 [B, 3, H, W] in [-1, 1], posterior noise [B, 4, H/8, W/8]) of the current step."""
        step = self.images // self.options.batch
        large = step % _LARGE_EVERY == _LARGE_EVERY - 1
        pool = self.pictures.large if large else self.pictures.base
        index = self.images + torch.arange(max(1, self.options.batch // 4) if large else self.options.batch)
        seed = self.options.seed
        images = to_unit(pool[random.randint(seed, "order", index, len(pool))])
        flip = random.randint(seed, "flip", index, 2).bool()
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        shape = (CHANNELS, images.shape[2] // FACTOR, images.shape[3] // FACTOR)
        return images, random.normal(seed, "posterior", index, shape)

    def step(self) -> dict[str, Tensor]:
        """One optimizer step; returns the detached loss terms."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        images, noise = self._batch()
        with torch.autocast("cpu", torch.bfloat16):
            mean, log_variance = self.network.moments(images)
            outputs = self.network.reconstruct(mean + torch.exp(0.5 * log_variance) * noise)
        terms = reconstruction_terms(images, outputs)
        terms["kl"] = kl_to_standard_normal(mean, log_variance)
        weights = {"l1": 1.0, "l2": self.options.l2_weight, "edge": self.options.edge_weight}
        weights["kl"] = self.options.kl_weight
        loss = sum(weights[name] * value for name, value in terms.items())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.images += self.options.batch
        self._average()
        self.elapsed_s += time.perf_counter() - started
        return {name: value.detach() for name, value in terms.items()}

    @torch.no_grad()
    def _average(self) -> None:
        steps = self.images // self.options.batch
        decay = min(self.options.ema_decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)

    @torch.no_grad()
    def held_out_psnr(self) -> float:
        """Mean PSNR in dB of the averaged network on the held-out pictures, from posterior means."""
        values = []
        for part in self.pictures.held_out.split(64):
            images = to_unit(part)
            values.append(psnr(images, self.average.reconstruct(self.average.moments(images)[0])))
        return float(torch.cat(values).mean())

    @torch.no_grad()
    def latent_scale(self, count: int = 1024) -> float:
        """1 / standard deviation of the averaged network's raw posterior samples, over `count` base pictures."""
        total = square = elements = 0.0
        for part in self.pictures.base[:count].split(64):
            mean, log_variance = self.average.moments(to_unit(part))
            total += float(mean.double().sum())
            square += float((mean.double().square() + log_variance.double().exp()).sum())
            elements += mean.numel()
        return 1 / math.sqrt(square / elements - (total / elements) ** 2)

    def save_weights(self, file: Path, notes: dict[str, str]) -> None:
        """The averaged weights in fp16 with the metadata `KLCodec` needs, written whole or not at all."""
        state = self.average.state_dict()
        tensors = {key: value.to(torch.float16).contiguous() for key, value in state.items()}
        metadata = {"format": FORMAT, "scale": repr(self.latent_scale()), "images": str(self.images), **notes}
        _write(tensors, metadata, file)

    def save_state(self, file: Path) -> None:
        """Everything `load_state` needs to go on as if never stopped."""
        tensors = {f"network.{key}": value for key, value in self.network.state_dict().items()}
        tensors |= {f"average.{key}": value for key, value in self.average.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            tensors |= {f"{part}.{name}": self.optimizer.state[parameter][part] for part in _ADAM}
        metadata = {
            "images": str(self.images),
            "elapsed_s": repr(self.elapsed_s),
            "options": json.dumps(asdict(self.options)),
        }
        _write({key: value.contiguous() for key, value in tensors.items()}, metadata, file)

    def load_state(self, file: Path) -> None:
        """Continue from `save_state`; ConfigError when it was made with other options."""
        tensors, metadata = read_safetensors(file)
        before, now = json.loads(metadata.get("options", "{}")), asdict(self.options)
        changed = [key for key in now if now[key] != before.get(key)]
        if changed:
            named = ", ".join(f"{key} {before.get(key)} (now {now[key]})" for key in changed)
            raise ConfigError(f"{file} was made with {named}; give the same options or another --out")
        for prefix, module in (("network.", self.network), ("average.", self.average)):
            own = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
            load_strict(module, own, str(file))
        self.images, self.elapsed_s = int(metadata["images"]), float(metadata["elapsed_s"])
        for name, parameter in self.network.named_parameters():
            moments = {part: torch.empty_like(parameter).copy_(tensors[f"{part}.{name}"]) for part in _ADAM}
            step = torch.tensor(float(self.images // self.options.batch))
            self.optimizer.state[parameter] = {"step": step, **moments}


def run(
    fitter: Fitter,
    folder: Path,
    notes: dict[str, str],
    report: Callable[[Progress], None],
    every_s: float = 20.0,
) -> None:
    """Train to the end; report about every `every_s` seconds, evaluate and save at every tenth and the last."""
    sums: dict[str, float] = {}
    steps = reports = 0
    seen, started = fitter.images, time.perf_counter()
    while fitter.share < 1.0:
        for name, value in fitter.step().items():
            sums[name] = sums.get(name, 0.0) + float(value)
        steps += 1
        took = time.perf_counter() - started
        if took < every_s and fitter.share < 1.0:
            continue
        reports += 1
        quality = None
        if reports % 10 == 3 or fitter.share == 1.0:
            quality = fitter.held_out_psnr()
            fitter.save_weights(folder / WEIGHTS_FILE, {**notes, "held_out_psnr": f"{quality:.2f}"})
            fitter.save_state(folder / STATE_FILE)
        remaining = fitter.elapsed_s * (1 / fitter.share - 1)
        losses = {name: value / steps for name, value in sums.items()}
        rate = (fitter.images - seen) / took
        report(Progress(fitter.images, fitter.share, rate, remaining, losses, quality))
        sums, steps, seen, started = {}, 0, fitter.images, time.perf_counter()


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], file: Path) -> None:
    partial = file.with_name(f".{file.name}.partial")
    save_file(tensors, partial, metadata)
    partial.chmod(0o644)  # safetensors makes files only the owner can read
    os.replace(partial, file)
