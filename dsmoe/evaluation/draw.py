"""Images from finished weights: which weights, which classes, drawn how, written where (`launchers/sample.py`).

Not here: the drawing itself (tasks.class_sampling) and what images are worth (class_agreement).
"""

import argparse
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsmoe.base.command_line import Parser
from dsmoe.base.diffusion import SAMPLERS, SPACING, SPACINGS, check_sampler
from dsmoe.base.errors import CheckpointError, ConfigError, choose_from
from dsmoe.base.plan import UNKNOWN_SHA, Plan
from dsmoe.base.run_folder import RunFolder
from dsmoe.checkpoint.weights import Weights, build_model, load_weights
from dsmoe.codec import build as build_codec
from dsmoe.codec.protocol import Codec
from dsmoe.evaluation.command import check_output, on_main_for_all, run, whole_file
from dsmoe.models.dit import DiT
from dsmoe.runtime.device import Device
from dsmoe.runtime.logging import get_logger
from dsmoe.tasks.class_sampling import Sampling, draw_shared, sampling_of
from dsmoe.tasks.pictures import grid

SHEET_IMAGES = 1024  # a sheet of more is no use to the eye; --npz holds them all
_WIDE, _WIDEST = 8, 16  # columns of a sheet
_CHANGEABLE = ("sampler", "steps", "spacing", "eta", "guidance", "cfg_channels", "seed")
_LISTED = 40  # class names that an error line still lists


@dataclass(frozen=True)
class Trained:
    """Finished weights ready to draw from: their file, what they are, the model and its codec on one device."""

    path: Path
    weights: Weights
    model: DiT
    codec: Codec
    device: torch.device

    @property
    def plan(self) -> Plan:
        return self.weights.plan

    def draw(self, labels: Tensor, numbers: Tensor, sampling: Sampling) -> Tensor:
        """uint8 [N, 3, H, W] on every rank for labels and image numbers int64 [N]; the ranks share the work."""
        return draw_shared(self.model, self.plan, self.codec, labels, numbers, sampling, device=self.device)


@dataclass(frozen=True)
class Foreign:
    """Reads weights of any origin, which is `convert`'s, a room beside this one: a launcher puts the two together.

    add_options(parser) adds the options that `read` asks for; read(path, options) gives the file's path and weights.
    """

    add_options: Callable[[argparse.ArgumentParser], None]
    read: Callable[[Path, argparse.Namespace], tuple[Path, Weights]]


def read_ours(path: Path, options: argparse.Namespace | None = None) -> tuple[Path, Weights]:
    """The averaged weights of a run folder, or a weight file of ours; CheckpointError when there are none."""
    file = find_weights(path)
    return file, load_weights(file)


def open_trained(run_or_file: str, device: Device, read: Callable[[Path], tuple[Path, Weights]] = read_ours) -> Trained:
    """Weights with their codec; read: how (a Foreign's, with its options).

    CheckpointError when there are none, they are damaged, or the codec found is another than they were trained with;
    ConfigError when they draw from more than a class.
    """
    path, weights = read(Path(run_or_file))
    if weights.plan.recipe.model.conditions:
        raise ConfigError(f"{path} draws from latents of other images; here images are drawn from a class alone.")
    recipe, facts = weights.plan.recipe, weights.plan.codec
    codec = build_codec(recipe.codec.name, recipe.codec.path)
    trained, found = facts.get("sha256"), codec.provenance["sha256"]
    if (codec.channels, str(codec.factor)) != (weights.plan.model.in_channels, facts["factor"]):
        raise CheckpointError(
            f"{path} knows latents of {weights.plan.model.in_channels} channels at 1/{facts['factor']} of the image "
            f"side, codec {codec.name} makes {codec.channels} at 1/{codec.factor}; give --codec another."
        )
    if trained == UNKNOWN_SHA:
        get_logger().info("which %s autoencoder the weights were trained with is not recorded: not checked", codec.name)
    elif trained != found:
        raise CheckpointError(
            f"{path} was trained with codec {facts['name']} of sha256 {trained}, but the one found "
            f"({recipe.codec.path or 'the one that ships with dsmoe'}) has sha256 {found}; its images would be wrong. "
            "Restore that codec file, or give --codec-path where it has moved to."
        )
    codec.to(device.torch_device)
    return Trained(path, weights, build_model(weights, device.torch_device), codec, device.torch_device)


def find_weights(path: Path) -> Path:
    """The weight file meant by a run folder (its averaged weights) or by a file itself."""
    if path.is_dir():
        file = RunFolder(path).checkpoints / "ema.safetensors"
        if not file.is_file():
            raise CheckpointError(
                f"folder {path} holds no ckpt/{file.name}; give the folder of a finished run, or a .safetensors file."
            )
        return file
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist; give a run folder or a .safetensors file.")
    return path


def choose_classes(text: str, names: Sequence[str]) -> list[int]:
    """Class numbers for "all" or a comma list of names and numbers, each once; a name goes before a number."""
    if text == "all":
        return list(range(len(names)))
    numbers = {name: number for number, name in reversed(list(enumerate(names)))}
    chosen = []
    for entry in (part.strip() for part in text.split(",")):
        if entry in numbers:
            chosen.append(numbers[entry])
        elif entry.isdecimal() and int(entry) < len(names):
            chosen.append(int(entry))
        elif len(names) <= _LISTED:
            raise ConfigError(choose_from("class", entry, names))
        else:
            raise ConfigError(
                f"unknown class {entry!r}; the run's plan.json lists all names, or give numbers in 0..{len(names) - 1}."
            )
    return list(dict.fromkeys(chosen))


def choose_sampling(plan: Plan, options: argparse.Namespace) -> Sampling:
    """The plan's own way of drawing with what the command line changes; ConfigError on values that cannot be."""
    own, spec = sampling_of(plan), plan.recipe.diffusion
    given = {name: getattr(options, name) for name in _CHANGEABLE if getattr(options, name) is not None}
    if given.get("sampler", own.sampler) != own.sampler:
        given = {"spacing": SPACING, "eta": 0.0} | given  # the run's own belong to its own sampler
    sampling = dataclasses.replace(own, **given)
    check_sampler(sampling.sampler, sampling.spacing, sampling.eta, spec)
    if not 1 <= sampling.steps <= spec.most_sample_steps:
        raise ConfigError(f"--steps is {sampling.steps}; these weights know 1 to {spec.most_sample_steps}.")
    if not (math.isfinite(sampling.guidance) and sampling.guidance >= 1):
        raise ConfigError(f"--guidance is {sampling.guidance}; it must be 1 (none) or more.")
    if sampling.guidance > 1 and not plan.model.null_class:
        raise ConfigError(
            f"--guidance is {sampling.guidance}, but these weights were trained without label dropout and know no "
            "unconditional image; give --guidance 1."
        )
    if not 0 <= sampling.seed < 2**63:
        raise ConfigError(f"--seed is {sampling.seed}; it must be from 0 to 2^63-1.")
    return sampling


def image_numbers(labels: Tensor, within: Tensor, num_classes: int) -> Tensor:
    """Number of the j-th image of a class, int64 like its arguments: j * classes + class.

    Noise is drawn by this number, so an image is the same whichever other classes are drawn, and image i of a
    training run's sample sheet (classes in turn) has number i.
    """
    return within * num_classes + labels


def add_sampling_options(parser: Parser) -> None:
    """The options that `choose_sampling` reads, and --checkpoint."""
    parser.add_argument(
        "--checkpoint", metavar="RUN|FILE", help="run folder (its averaged weights), or a weight file or folder"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="network evaluations an image (default: the run's)")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: the run's (euler for rectified flow, else ddim)")
    parser.add_argument("--spacing", choices=SPACINGS, help="timesteps that ddim visits (default: the run's)")
    parser.add_argument("--eta", type=float, metavar="E", help="of ddim, 0 (deterministic) to 1 (default: the run's)")
    parser.add_argument("--guidance", type=float, metavar="G", help="classifier-free guidance, 1 for none")
    parser.add_argument("--cfg-channels", type=_channels, metavar="3|all", help="latent channels that are guided")
    parser.add_argument("--seed", type=int, metavar="S", help="default: the run's")


def _channels(text: str) -> int | str:
    if text not in ("3", "all"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 3 nor all")
    return text if text == "all" else int(text)


def main(
    argv: Sequence[str],
    description: str,
    environ: Mapping[str, str] = os.environ,
    foreign: Foreign | None = None,
) -> int:
    """`launchers/sample.py`: draw a captioned sheet, on all ranks that were started; returns the exit code."""
    parser = Parser(description)
    add_sampling_options(parser)
    if foreign is not None:
        foreign.add_options(parser)
    parser.add_argument("--classes", default="all", metavar="all|NAME,ID,...", help="default all")
    parser.add_argument("--per-class", type=int, default=4, metavar="N", help="images of each class (default 4)")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="default: in the run's samples folder")
    parser.add_argument(
        "--npz", type=Path, metavar="FILE.npz", help="also all images: arr_0 uint8 [N, H, W, 3], labels, numbers"
    )
    return run(parser, argv, functools.partial(_sample, foreign.read if foreign else read_ours), environ)


def _sample(
    read: Callable[[Path, argparse.Namespace], tuple[Path, Weights]], options: argparse.Namespace, device: Device
) -> int:
    if options.checkpoint is None:
        raise ConfigError("--checkpoint is missing; give a run folder or a .safetensors file.")
    if options.per_class < 1:
        raise ConfigError(f"--per-class is {options.per_class}; it must be at least 1.")
    trained = open_trained(options.checkpoint, device, functools.partial(read, options=options))
    plan = trained.plan
    sampling = choose_sampling(plan, options)
    classes = torch.tensor(choose_classes(options.classes, plan.data.class_names))
    out = options.out or default_sheet(trained, sampling)
    on_main_for_all(functools.partial(_check_outputs, out, options.npz))
    labels = classes.repeat_interleave(options.per_class)
    numbers = image_numbers(labels, torch.arange(options.per_class).repeat(len(classes)), plan.model.num_classes)
    log = get_logger("sample")
    log.info("weights %s (%s, %s images seen)", trained.path, trained.weights.kind, f"{trained.weights.images_seen:,}")
    log.info("%d images of %d classes: %s", len(labels), len(classes), describe(sampling))
    images = trained.draw(labels, numbers, sampling).permute(0, 2, 3, 1).numpy()
    on_main_for_all(functools.partial(_write, images, labels, numbers, options, out, plan.data.class_names))
    return 0


def describe(sampling: Sampling) -> str:
    """One line for people."""
    return (
        f"{' '.join([sampling.sampler, *_unusual(sampling)])}, {sampling.steps} steps, guidance {sampling.guidance:g} "
        f"(channels {sampling.cfg_channels}), seed {sampling.seed}"
    )


def _unusual(sampling: Sampling) -> list[str]:
    """Spacing and eta where they are not the default."""
    return [sampling.spacing] * (sampling.spacing != SPACING) + [f"eta{sampling.eta:g}"] * (sampling.eta != 0)


def default_sheet(trained: Trained, sampling: Sampling) -> Path:
    """In the run's samples folder; beside the file when it does not lie in a run."""
    folder = trained.path.parent
    if folder.name == "ckpt" and RunFolder(folder.parent).plan.exists():
        folder = RunFolder(folder.parent).samples
    weights, walk = trained.weights, "-".join([f"{sampling.sampler}{sampling.steps}", *_unusual(sampling)])
    return folder / (f"{weights.kind}-{weights.images_seen:09d}-{walk}-g{sampling.guidance:g}-seed{sampling.seed}.png")


def _check_outputs(out: Path, npz: Path | None) -> None:
    check_output(out, "--out", ".png")
    if npz is not None:
        check_output(npz, "--npz", ".npz")


def _write(
    images: np.ndarray,
    labels: Tensor,
    numbers: Tensor,
    options: argparse.Namespace,
    out: Path,
    names: Sequence[str],
) -> None:
    log = get_logger("sample")
    if options.npz is not None:
        with whole_file(options.npz) as file, file.open("wb") as stream:
            np.savez(stream, arr_0=images, labels=labels.numpy(), numbers=numbers.numpy())
        log.info("images  %s", options.npz)
    shown, columns = sheet_layout(len(labels) // options.per_class, options.per_class)
    rows = torch.arange(len(labels)).view(-1, options.per_class)[:, :shown].flatten()[:SHEET_IMAGES]
    if len(rows) < len(labels):
        log.info("the sheet shows %d of %d images; --npz holds them all", len(rows), len(labels))
    sheet = grid(images[rows.numpy()], [names[y] for y in labels[rows].tolist()], columns)
    with whole_file(out) as file:
        sheet.save(file, format="PNG")
    log.info("samples %s", out)


def sheet_layout(classes: int, per_class: int) -> tuple[int, int]:
    """(images shown of each class, columns): whole classes a row, at most SHEET_IMAGES in all."""
    shown = min(per_class, max(1, SHEET_IMAGES // classes))
    columns = _WIDEST if shown > _WIDEST else max(shown, _WIDE // shown * shown)
    return shown, columns
