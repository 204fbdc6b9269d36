"""`python -m dsmoe routing RUN`: heat maps and a summary of where a run's routers send its images.

Read from the run folder alone, while it trains or afterwards. Not here: the counting (training.routing_log) and reading
the counts back (routing_maps).
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from numpy import ndarray

from dsmoe.base.errors import ConfigError
from dsmoe.base.plan import Plan
from dsmoe.base.run_folder import RunFolder
from dsmoe.evaluation.command import check_output, whole_file
from dsmoe.evaluation.routing_maps import Routing, read

_LISTED = 8  # dead experts that the summary names
_TICKS = 16  # labels on an axis
_NAME = 20  # letters of a class name
_SPAN = 0.25  # the colours reach at least this far on both sides of a fair share
_CELLS = 64  # a map of no more gets its numbers written in


def report(run: str, out: str | None = None) -> str:
    """Draw the heat maps of a run folder into `out` (default RUN/routing.png); the summary as text.

    ConfigError for a folder that is no run, a dense model or a file that cannot be written, DataError for a
    routing.jsonl that is missing or damaged.
    """
    folder = RunFolder(Path(run))
    plan = _read_plan(folder)
    if not plan.recipe.model.is_moe:
        raise ConfigError(f"{run} trains a dense model; only one with experts has routing to show.")
    routing = read(folder.routing, plan.recipe.model)
    path = folder.path / "routing.png" if out is None else Path(out)
    check_output(path, "--out", ".png")
    with whole_file(path) as temporary:
        draw(routing, plan, temporary)
    return "\n".join([*summary(routing, plan), f"drawn      {path}"])


def _read_plan(folder: RunFolder) -> Plan:
    try:
        return Plan.from_dict(json.loads(folder.plan.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{folder.path} is not a run folder (it has no {folder.plan.name}); give one such as runs/NAME."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder.plan} cannot be read ({error}); give another run folder.") from error


def summary(routing: Routing, plan: Plan) -> list[str]:
    """What the picture shows, in lines."""
    spec, entropy = plan.recipe.model, routing.end_entropy
    worst = int(entropy.argmin())
    share = routing.end * routing.experts
    layer, expert = np.unravel_index(share.argmax(), share.shape)
    dead = [f"layer {at[0]} expert {at[1]} ({share[at]:.1%} of a fair share)" for at in routing.dead[:_LISTED]]
    more = [f"and {len(routing.dead) - _LISTED} more"] * (len(routing.dead) > _LISTED)
    rows = [
        ("run", f"{plan.recipe.name}, {spec.depth} layers of {spec.num_experts} experts, {spec.top_k} a token"),
        (
            "seen",
            f"{int(routing.images_seen[-1]):,} images in {len(routing.load)} log intervals; "
            f"what follows is over the last {routing.end_images:,}",
        ),
        ("entropy", f"{entropy.mean():.4f} (1 = even), lowest in layer {worst}: {entropy[worst]:.4f}"),
        ("busiest", f"layer {layer} expert {expert}: {share.max():.2f} times a fair share"),
        ("dead", ", ".join(dead + more) or "none"),
    ]
    for name, found in (("timestep", routing.timestep_change), ("class", routing.class_change)):
        most = int(found.argmax())
        rows.append((name, f"moves {found.mean():.1%} of the choices, most in layer {most}: {found[most]:.1%}"))
    return [f"{name:<11}{text}" for name, text in rows]


def draw(routing: Routing, plan: Plan, path: Path) -> None:
    """Load at the end, over training, by timestep and by class, as a PNG of six panels."""
    figure = Figure(figsize=(16, 9), layout="constrained")
    FigureCanvasAgg(figure)
    (end, entropy, training), (timestep, classes, layers) = figure.subplots(2, 3)
    figure.suptitle(f"{plan.recipe.name}: expert load, {int(routing.images_seen[-1]):,} images seen")
    _end(end, routing)
    _entropy(entropy, routing)
    _training(training, routing)
    _timestep(timestep, routing)
    _classes(classes, routing, plan)
    _layers(layers, routing)
    figure.savefig(path, dpi=110, format="png")


def _end(axes: Axes, routing: Routing) -> None:
    share = routing.end * routing.experts
    norm = _heat(axes, share, np.arange(routing.experts + 1) - 0.5)
    if share.size <= _CELLS:
        for (layer, expert), value in np.ndenumerate(share):
            text = f"{value:.2f}" + "\ndead" * ((layer, expert) in routing.dead)
            pale = abs(norm(value) - 0.5) < 0.3
            axes.text(expert, layer, text, ha="center", va="center", fontsize=8, color="black" if pale else "white")
    else:
        for layer, expert in routing.dead:
            axes.plot(expert, layer, "x", color="gold")
    _number(axes.xaxis, routing.experts)
    marked = ", x: dead" if routing.dead and share.size > _CELLS else ""
    axes.set(xlabel="expert", ylabel="layer", title=f"load over the last {routing.end_images:,} images{marked}")


def _entropy(axes: Axes, routing: Routing) -> None:
    layers = routing.entropy.T
    mesh = axes.pcolormesh(
        _edges(routing), np.arange(len(layers) + 1) - 0.5, layers, vmin=min(0.9, layers.min()), vmax=1
    )
    axes.figure.colorbar(mesh, ax=axes, label="load entropy (1 = even)")
    _number(axes.yaxis, len(layers))
    axes.invert_yaxis()
    axes.set(xlabel="images seen (thousands)", ylabel="layer", title="load entropy over training")


def _training(axes: Axes, routing: Routing) -> None:
    layer = int(routing.end_entropy.argmin())
    _heat(axes, routing.load[:, layer].T * routing.experts, _edges(routing))
    axes.set(xlabel="images seen (thousands)", ylabel="expert", title=f"layer {layer} (least even) over training")


def _timestep(axes: Axes, routing: Routing) -> None:
    layer = int(routing.timestep_change.argmax())
    _heat(axes, routing.by_timestep[:, layer].T * routing.experts, np.linspace(0, 1, len(routing.by_timestep) + 1))
    axes.set(xlabel="timestep t/T (1 = noise)", ylabel="expert", title=f"layer {layer} (changes most) by timestep")


def _classes(axes: Axes, routing: Routing, plan: Plan) -> None:
    layer, rows = int(routing.class_change.argmax()), len(routing.classes)
    _heat(axes, routing.by_class[:, layer].T * routing.experts, np.arange(rows + 1) - 0.5)
    shown = range(0, rows, -(-rows // (2 * _TICKS)))
    names = [_class_name(routing.classes[row], plan.data.class_names) for row in shown]
    axes.set_xticks(list(shown), names, rotation=90, fontsize=8)
    axes.set(ylabel="expert", title=f"layer {layer} (changes most) by class")


def _class_name(row: str, names: tuple[str, ...]) -> str:
    """A single class by its name, a group by its ids."""
    return names[int(row)][:_NAME] if row.isdecimal() and int(row) < len(names) else row


def _layers(axes: Axes, routing: Routing) -> None:
    layers = np.arange(len(routing.end))
    for label, found in (("timestep", routing.timestep_change), ("class", routing.class_change)):
        axes.plot(layers, 100 * found, marker="o", label=f"by {label}")
    _number(axes.xaxis, len(layers))
    axes.set(xlabel="layer", ylabel="choices moved (%)", title="dependence on timestep and class")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _heat(axes: Axes, share: ndarray, edges: ndarray) -> TwoSlopeNorm:
    """Multiples of a fair share [rows, columns]: white where fair, red above, blue below, grey where none was seen."""
    norm = TwoSlopeNorm(1, min(1 - _SPAN, np.nanmin(share)), max(1 + _SPAN, np.nanmax(share)))
    axes.set_facecolor("lightgrey")
    rows = np.arange(len(share) + 1) - 0.5
    mesh = axes.pcolormesh(edges, rows, share, cmap="RdBu_r", norm=norm)
    axes.figure.colorbar(mesh, ax=axes, label="load (1 = fair share)")
    _number(axes.yaxis, len(share))
    axes.invert_yaxis()
    return norm


def _edges(routing: Routing) -> ndarray:
    """Where log intervals begin and end, in thousands of images."""
    return np.concatenate([[0], routing.images_seen]) / 1000


def _number(axis: object, count: int) -> None:
    axis.set_ticks(range(0, count, -(-count // _TICKS)))
