"""What a run's routing.jsonl tells, as arrays.

Not here: who writes it (training.routing_log), its pictures and its summary (routing).
"""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray

from dsmoe.base.errors import DataError
from dsmoe.base.presets import ModelSpec
from dsmoe.moe.statistics import dead_experts, load_entropy

TAIL = 0.1  # of all images seen: what "at the end" is taken over
_ROWS = {"by_timestep": "timestep_images", "by_class": "class_images"}


@dataclass(frozen=True)
class Routing:
    """What routing.jsonl tells. Loads are shares of the choices: they sum to 1 over experts, and 1/E is a fair one.

    images_seen [W] and load [W, L, E] of every log interval. Over the intervals of the last tenth of the images:
    end [L, E], by_timestep [bins, L, E], by_class [rows, L, E], NaN in rows without images; timestep_images [bins],
    class_images [rows]; classes: names of the rows.
    """

    images_seen: ndarray
    load: ndarray
    end: ndarray
    end_images: int
    by_timestep: ndarray
    timestep_images: ndarray
    by_class: ndarray
    class_images: ndarray
    classes: tuple[str, ...]

    @property
    def experts(self) -> int:
        """E."""
        return self.end.shape[1]

    @property
    def entropy(self) -> ndarray:
        """[W, L] for each interval, 1 when all experts share alike."""
        return load_entropy(torch.from_numpy(self.load)).numpy()

    @property
    def end_entropy(self) -> ndarray:
        """[L] at the end."""
        return load_entropy(torch.from_numpy(self.end)).numpy()

    @property
    def dead(self) -> list[tuple[int, int]]:
        """(layer, expert) that are dead at the end."""
        return list(map(tuple, dead_experts(torch.from_numpy(self.end)).nonzero().tolist()))

    @property
    def timestep_change(self) -> ndarray:
        """[L]; see `change`."""
        return change(self.by_timestep, self.timestep_images)

    @property
    def class_change(self) -> ndarray:
        """[L]; see `change`."""
        return change(self.by_class, self.class_images)


def change(by_row: ndarray, images: ndarray) -> ndarray:
    """[L]: share of the choices that would go elsewhere if every row [rows, L, E] were routed as the mean is.

    Total variation distance, averaged over images [rows]: 0 when the rows are alike. Chance adds to it when rows hold
    few images.
    """
    weights = (images / images.sum())[:, None, None]
    rows = np.nan_to_num(by_row)
    mean = (weights * rows).sum(0)
    return (weights * np.abs(rows - mean)).sum((0, 2)) / 2


def read(path: Path, spec: ModelSpec) -> Routing:
    """The whole file; DataError when it is missing, empty or damaged. A last line still being written is left out."""
    last = deque(_lines(path), maxlen=1)
    if not last:
        raise DataError(f"{path} holds no interval yet; it gets one at step 1 and every report.log_every images.")
    final = _parse(path, *last.pop(), spec)
    sums = {name: np.zeros_like(final[name]) for name in ("load", *_ROWS, *_ROWS.values(), "images")}
    seen, load = [], []
    for number, line in _lines(path):
        row = _parse(path, number, line, spec, final)
        seen.append(row["images_seen"])
        load.append(row["load"])
        if row["images_seen"] > (1 - TAIL) * final["images_seen"]:
            _add(sums, row)
    with np.errstate(invalid="ignore"):  # rows without images become NaN
        maps = {name: sums[name] / sums[images][:, None, None] for name, images in _ROWS.items()}
    return Routing(
        images_seen=np.array(seen),
        load=np.stack(load),
        end=sums["load"] / sums["images"],
        end_images=int(sums["images"]),
        by_timestep=maps["by_timestep"],
        timestep_images=sums["timestep_images"],
        by_class=maps["by_class"],
        class_images=sums["class_images"],
        classes=tuple(final["classes"]),
    )


def _add(sums: dict[str, ndarray], row: dict) -> None:
    """Shares weighted by the images that they were counted over."""
    sums["images"] += row["images"]
    sums["load"] += row["load"] * row["images"]
    for name, images in _ROWS.items():
        sums[images] += row[images]
        sums[name] += row[name] * row[images][:, None, None]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith("\n"):
                    yield number, line
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; a run with experts writes it at step 1 and every report.log_every images."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error


def _parse(path: Path, number: int, line: str, spec: ModelSpec, like: dict | None = None) -> dict:
    """One interval with its lists as fp64 arrays of the right shapes, with rows as another has them."""
    try:
        row = json.loads(line)
        if like is not None and row["classes"] != like["classes"]:
            raise ValueError("other classes than in the last line")
        bins, rows, map_shape = len(row["timestep_images"]), len(row["classes"]), (spec.depth, spec.num_experts)
        shapes = {"images_seen": (), "images": (), "timestep_images": (bins,), "class_images": (rows,)}
        shapes |= {"load": map_shape, "by_timestep": (bins, *map_shape), "by_class": (rows, *map_shape)}
        for name, shape in shapes.items():
            row[name] = _array(row[name], shape if like is None else like[name].shape)
        if row["images"] <= 0:
            raise ValueError("an interval without images")
        return row
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} line {number} is damaged ({type(error).__name__}: {error}); remove that line."
        ) from error


def _array(values: object, shape: tuple[int, ...]) -> ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.shape != shape or not np.isfinite(found).all():
        raise ValueError(f"numbers of shape {found.shape} where {shape} belong")
    return found
