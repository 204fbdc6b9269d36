"""Sample sheets while training and at its end, drawn from the averaged weights by all ranks together."""

from collections.abc import Iterator
from pathlib import Path

import torch

from dsmoe.base.plan import Plan
from dsmoe.base.recipe import EMA
from dsmoe.checkpoint.weights import MODEL, Weights, build_model, stream_weights
from dsmoe.codec.protocol import Codec
from dsmoe.runtime import distributed
from dsmoe.runtime.device import Device, host_free_bytes
from dsmoe.runtime.logging import get_logger
from dsmoe.tasks.class_sampling import draw_shared, sampling_of
from dsmoe.tasks.pictures import grid, save_png
from dsmoe.training.ema import Ema
from dsmoe.training.engine import Engine, gather

COLUMNS = 8
FLOAT = 4
SPARE = 0.8  # the share of free memory that a sheet may take for weights; drawing and other jobs need some too


class SampleSheets:
    """Draws `report.samples` images over the classes in turn into samples/images-<n>.png."""

    def __init__(self, plan: Plan, codec: Codec, folder: Path, device: Device) -> None:
        self._plan, self._codec, self._folder, self._device = plan, codec, folder, device
        every = plan.recipe.report.sample_every
        self._every_steps = max(1, round(every / plan.recipe.train.global_batch)) if every else 0

    def due(self, step: int) -> bool:
        """Whether a sheet is wanted after `step` steps (the one at the end is drawn from the final weights)."""
        return bool(self._every_steps) and step % self._every_steps == 0 and step < self._plan.recipe.train.steps

    def draw(self, engine: Engine, ema: Ema, images_seen: int) -> Path | None:
        """Sheet of the run's own average; the ranks share the work, rank 0 writes the picture, all return its path.

        Every rank holds a full fp32 copy of the weights meanwhile; where that does not fit, none draws, rank 0 says
        so, and all return None. Every rank calls it.
        """
        if not self._fits(images_seen):
            return None
        report, model_facts = self._plan.recipe.report, self._plan.model
        weights = Weights(dict(whole_tensors(engine, ema, EMA)), self._plan, images_seen, EMA)
        model = build_model(weights, self._device.torch_device)
        labels = torch.arange(report.samples) % model_facts.num_classes
        images = draw_shared(
            model,
            self._plan,
            self._codec,
            labels,
            torch.arange(report.samples),
            sampling_of(self._plan),
            device=self._device.torch_device,
        )
        path = self._folder / f"images-{images_seen:09d}.png"
        self._save(images, labels.tolist(), path)
        return path

    def _fits(self, images_seen: int) -> bool:
        """Whether every rank has room for the whole model: twice on its share of the host, once on the device."""
        whole = FLOAT * self._plan.model.parameters
        room = min(host_free_bytes() / distributed.ranks_on_this_host() / 2, self._device.free_memory_bytes())
        least = int(distributed.all_reduce_(torch.tensor(SPARE * room, dtype=torch.float64), "min"))
        if whole > least and distributed.is_main():
            get_logger("samples").warning(
                "no sample sheet at %s images: the model takes %.1f GB in fp32 and a rank has room for %.1f GB; draw "
                "from the weight file with launchers/sample.py where it fits",
                f"{images_seen:,}", whole / 1e9, least / 1e9,
            )  # fmt: skip
        return whole <= least

    @distributed.on_main
    def _save(self, images: torch.Tensor, labels: list[int], path: Path) -> None:
        names = self._plan.data.class_names
        save_png(grid(images.permute(0, 2, 3, 1).numpy(), [names[y] for y in labels], COLUMNS), path)
        get_logger("samples").info("wrote %s", path)


def whole_tensors(engine: Engine, ema: Ema, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """fp32 weights by name on every rank's CPU, one at a time: an average's by its name, or the model's own for kind
    `model`. Every rank has to exhaust it."""
    yield from gather(engine.fragments() if kind == MODEL else ema.averages[kind], engine.shapes())
    yield from ((name, buffer.cpu()) for name, buffer in engine.buffers().items())


def export_weights(path: Path, plan: Plan, engine: Engine, ema: Ema, kind: str, images_seen: int) -> None:
    """Rank 0 writes the weight file; no rank holds more than one whole tensor."""
    tensors = whole_tensors(engine, ema, kind)
    shapes = engine.shapes() | {name: tuple(buffer.shape) for name, buffer in engine.buffers().items()}
    if distributed.is_main():
        stream_weights(path, shapes, tensors, plan, images_seen, kind)
    else:
        for _ in tensors:
            pass
