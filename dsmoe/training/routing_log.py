"""Where the routers sent the images of a log window, by layer, time and class, and the alarm for dead experts.

Lives here: sums on the device, what metrics.jsonl, routing.jsonl and TensorBoard get of them. Not here: when a window
ends and where files lie (telemetry), the load that balance scope `step` uses (loop), pictures (evaluation.routing).
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsmoe.base.plan import Plan
from dsmoe.moe.balance import shares
from dsmoe.moe.statistics import DEAD_SHARE, dead_experts, load_entropy, load_imbalance
from dsmoe.runtime import distributed
from dsmoe.runtime.logging import get_logger

TIME_BINS = 10
CLASS_GROUPS = 64
DEAD_INTERVALS = 2
_LISTED = 20  # experts that a warning names; metrics.jsonl lists all
_PIXELS = 12  # side of an expert's square in TensorBoard


class Routed(NamedTuple):
    """Where a micro-batch went. load [L, E], load_per_sample [B, L, E]: of models.dit.ModelStats; t [B]: times as the
    objective counts them; y int64 [B]: classes as the model was told, the null class where dropped."""

    load: Tensor
    load_per_sample: Tensor
    t: Tensor
    y: Tensor


@dataclass(frozen=True)
class Window:
    """All ranks' choices of one log window on the host, counted by expert.

    by_timestep int64 [TIME_BINS, L, E], by_class int64 [rows, L, E]; classes: the name of each row; choices: of an
    image in a layer (tokens x top_k).
    """

    by_timestep: Tensor
    by_class: Tensor
    classes: tuple[str, ...]
    choices: int

    @property
    def load(self) -> Tensor:
        """Share of the choices fp64 [L, E]."""
        return shares(self.by_timestep.sum(0), torch.float64)

    def summary(self) -> dict[str, object]:
        """For metrics.jsonl: entropy (1 = even), the busiest expert in units of the mean, dead experts by layer."""
        load = self.load
        entropy, imbalance = load_entropy(load), load_imbalance(load)
        dead = dead_experts(load).nonzero().tolist()
        return {
            "load_entropy": entropy.mean().item(),
            "load_max_over_mean": imbalance.max().item(),
            "dead_experts": len(dead),
            "dead": [_name(layer, expert) for layer, expert in dead],
            "layer_entropy": _rounded(entropy, 6),
            "layer_max_over_mean": _rounded(imbalance, 4),
        }

    def maps(self) -> dict[str, object]:
        """For routing.jsonl: shares [L][E], also by timestep and class, where a row without images is all 0."""
        return {
            "images": self._images(self.by_timestep.sum(0)),
            "load": _rounded(self.load, 6),
            "timestep_images": self._images(self.by_timestep),
            "by_timestep": _rounded(shares(self.by_timestep, torch.float64), 4),
            "classes": list(self.classes),
            "class_images": self._images(self.by_class),
            "by_class": _rounded(shares(self.by_class, torch.float64), 4),
        }

    def show(self, writer: object, images_seen: int) -> None:
        """Into TensorBoard: two curves a layer, and the load as a picture [L, E], mid-grey where it is a fair share."""
        load = self.load
        curves = {"layer_entropy": load_entropy(load), "layer_max_over_mean": load_imbalance(load)}
        for name, values in curves.items():
            for layer, value in enumerate(values.tolist()):
                writer.add_scalar(f"{name}/{layer:02d}", value, images_seen)
        grey = (load * load.shape[1] / 2).clamp(max=1)
        squares = grey.repeat_interleave(_PIXELS, 0).repeat_interleave(_PIXELS, 1)
        writer.add_image("load/layers_by_experts", squares[None], images_seen)

    def _images(self, counts: Tensor) -> object:
        """Images behind counts [..., L, E]: each makes `choices` in every layer."""
        return (counts[..., 0, :].sum(-1) // self.choices).tolist()


class RoutingLog:
    """Counts the choices of the open log window on this rank's device, without waiting for it.

    Counts are whole numbers, so their sums are the same bits in any order, on any layout, resumed or not.
    """

    def __init__(self, plan: Plan, device: torch.device, resumed: dict | None = None) -> None:
        """resumed: the `position` to go on from."""
        spec, diffusion, model = plan.recipe.model, plan.recipe.diffusion, plan.model
        self._choices = (model.input_size // spec.patch) ** 2 * spec.top_k
        self._time_span = 1 if diffusion.is_flow else diffusion.timesteps
        self._num_classes, self._groups = model.num_classes, min(model.num_classes, CLASS_GROUPS)
        self._classes = class_rows(model.num_classes, model.null_class)
        shape = (TIME_BINS + len(self._classes), spec.depth, spec.num_experts)
        self._counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._dead_for = torch.zeros(shape[1:], dtype=torch.int64)
        if resumed is not None:
            self._dead_for = torch.tensor(resumed["dead_for"])
            if distributed.is_main():  # the sums of all ranks, so they must enter once
                self._counts.copy_(torch.tensor(resumed["counts"]).view(shape))

    def add(self, batch: Routed) -> None:
        """Count a micro-batch of this rank."""
        counts = (batch.load_per_sample * self._choices).round().long()
        times = (batch.t * TIME_BINS // self._time_span).long().clamp(max=TIME_BINS - 1)  # a flow's t may be 1
        # Neighbouring class ids share a row; the null class, num_classes, comes out as the row after the last group.
        classes = batch.y * self._groups // self._num_classes
        self._counts[:TIME_BINS].index_add_(0, times, counts)
        self._counts[TIME_BINS:].index_add_(0, classes, counts)

    def take(self) -> Window:
        """The window of all ranks together, which all call; the next begins."""
        total, self._counts = distributed.all_reduce_(self._counts), torch.zeros_like(self._counts)
        total = total.cpu()
        return Window(total[:TIME_BINS], total[TIME_BINS:], self._classes, self._choices)

    def position(self) -> dict:
        """The open window and the alarm as plain data for `resumed`; all ranks call it, rank 0's counts."""
        counts = distributed.all_reduce_(self._counts.clone())
        return {"counts": counts.flatten().tolist(), "dead_for": self._dead_for.tolist()}

    def watch(self, load: Tensor, images_seen: int) -> None:
        """Warn of experts that this window's load [L, E] makes dead for DEAD_INTERVALS in a row, or alive again."""
        dead, before = dead_experts(load), self._dead_for
        self._dead_for = torch.where(dead, before + 1, 0)
        log, share = get_logger("train"), load * load.shape[1]
        if (died := self._dead_for == DEAD_INTERVALS).any():
            log.warning(
                "DEAD at %s images, below %.0f %% of a fair share for %d log intervals: %s",
                f"{images_seen:,}", 100 * DEAD_SHARE, DEAD_INTERVALS, _listed(died, share),
            )  # fmt: skip
        if (back := ~dead & (before >= DEAD_INTERVALS)).any():
            log.warning("no longer dead at %s images: %s", f"{images_seen:,}", _listed(back, share))


def class_rows(num_classes: int, null_class: bool) -> tuple[str, ...]:
    """Names of the rows of a class map: ids one by one, or in CLASS_GROUPS groups of neighbours; "none" last.

    class_rows(3, True) is ("0", "1", "2", "none"); of 1000 classes the first row is "0-15".
    """
    groups = min(num_classes, CLASS_GROUPS)
    starts = [-(-group * num_classes // groups) for group in range(groups + 1)]
    spans = [(start, end - 1) for start, end in itertools.pairwise(starts)]
    names = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    return (*names, "none") if null_class else tuple(names)


def _listed(chosen: Tensor, share: Tensor) -> str:
    """Names of the chosen experts bool [L, E], each with its share in units of the fair one."""
    found = chosen.nonzero().tolist()
    names = [f"{_name(layer, expert)} ({share[layer, expert]:.1%})" for layer, expert in found[:_LISTED]]
    more = [f"and {len(found) - _LISTED} more"] * (len(found) > _LISTED)
    return ", ".join(names + more)


def _name(layer: int, expert: int) -> str:
    return f"layer {layer} expert {expert}"


def _rounded(values: Tensor, digits: int) -> list:
    """Nested lists of numbers that print short."""
    return ((values.double() * 10**digits).round() / 10**digits).tolist()
