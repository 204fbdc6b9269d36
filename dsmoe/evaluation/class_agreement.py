"""Class agreement: how often a classifier of real scenes finds the class that an image was generated for.

The measure, its bound and its controls. A sample that shows its class costs the model what it was trained for; no
other network's features and no reference statistics are involved. Not here: the classifier (scenes_classifier), the
drawing (draw), and the command line (benchmarks/class_agreement.py).

Protocol: class labels in turn, each class equally often; chance is 1 / classes. Controls: the same scenes real and
through the codec (the ceiling), and the generated images against their labels shuffled (the floor).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from dsmoe.base.errors import ConfigError
from dsmoe.codec.protocol import Codec
from dsmoe.data.transforms import to_float, to_uint8
from dsmoe.evaluation.scenes_classifier import SIDE, ScenesClassifier, render
from dsmoe.ops import random

CONFIDENCE = 0.95


def wilson_lower(successes: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """Lower end of the two-sided Wilson score interval for a share (Wilson 1927), in [0, 1].

    With z the (1 + confidence) / 2 quantile of the normal: (p + z^2/2n - z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    Stricter than a one-sided bound of the same confidence, whose z is smaller.
    """
    assert 0 <= successes <= trials, f"{successes} of {trials}"
    assert trials > 0, "no trials"
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = successes / trials, z * z / trials
    root = z * math.sqrt((share * (1 - share) + spread / 4) / trials)
    return max(0.0, (share + spread / 2 - root) / (1 + spread))


@dataclass(frozen=True)
class Agreement:
    """Verdicts on one set of images. confusion[y][f]: how many of label y were found to be class f."""

    confusion: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        return sum(map(sum, self.confusion))

    @property
    def agreed(self) -> int:
        return sum(row[label] for label, row in enumerate(self.confusion))

    @property
    def share(self) -> float:
        return self.agreed / self.count

    @property
    def lower(self) -> float:
        """Lower 95 % bound of the share."""
        return wilson_lower(self.agreed, self.count)

    @property
    def chance(self) -> float:
        """The share that verdicts without regard to the image reach on balanced labels."""
        return 1 / len(self.confusion)

    @property
    def ratio(self) -> float:
        """Lower bound over chance: what a requirement of "4x chance" is about."""
        return self.lower / self.chance

    def to_dict(self) -> dict:
        """Plain data for a JSON report."""
        return {
            "images": self.count,
            "agreed": self.agreed,
            "agreement": self.share,
            "lower_95": self.lower,
            "chance": self.chance,
            "lower_over_chance": self.ratio,
            "confusion": [list(row) for row in self.confusion],
        }


def agreement(found: Tensor, labels: Tensor, num_classes: int) -> Agreement:
    """Count verdicts int64 [N] against labels int64 [N]."""
    assert found.shape == labels.shape, f"{list(found.shape)} verdicts on {list(labels.shape)} labels"
    pairs = torch.bincount(labels * num_classes + found, minlength=num_classes**2)
    return Agreement(tuple(tuple(row) for row in pairs.view(num_classes, num_classes).tolist()))


def balanced_labels(samples: int, num_classes: int) -> Tensor:
    """Labels 0, 1, ... in turn, int64 [samples]; ConfigError unless each class comes equally often."""
    if samples < num_classes or samples % num_classes:
        near = max(num_classes, samples // num_classes * num_classes)
        raise ConfigError(f"--samples {samples} is not a multiple of the {num_classes} classes; give such as {near}.")
    return torch.arange(samples) % num_classes


def shuffled(labels: Tensor, seed: int) -> Tensor:
    """The labels in an order that has nothing to do with the images; equal for equal seeds."""
    return labels[random.permutation(seed, 0, len(labels))]


@torch.no_grad()
def round_trip(codec: Codec, images: Tensor, device: torch.device, batch_size: int = 64) -> Tensor:
    """uint8 [N, 3, H, W] encoded (posterior mean) and decoded again: the best that generated latents can look."""
    parts = [
        to_uint8(codec.decode(codec.encode(to_float(part.to(device))).mean)).cpu() for part in images.split(batch_size)
    ]
    return torch.cat(parts)


@dataclass(frozen=True)
class Measurement:
    """Everything measured on one set of weights.

    generated: the measure. shuffled: the same images against shuffled labels. held_out: real validation scenes at the
    classifier's own side. at_side, round_trip: the same scenes at the run's resolution, plain and through its codec.
    """

    generated: Agreement
    shuffled: Agreement
    held_out: Agreement
    at_side: Agreement
    round_trip: Agreement

    def rows(self) -> list[tuple[str, Agreement]]:
        """(what, verdicts) in the order in which people read them."""
        return [
            ("generated", self.generated),
            ("generated, labels shuffled (floor)", self.shuffled),
            ("real, through the codec (ceiling)", self.round_trip),
            ("real, at the run's resolution", self.at_side),
            (f"real, {SIDE} px", self.held_out),
        ]


def measure(
    classifier: ScenesClassifier,
    codec: Codec,
    images: Tensor,
    labels: Tensor,
    *,
    held_out: int,
    seed: int,
    device: torch.device,
) -> Measurement:
    """Judge generated images uint8 [N, 3, S, S] with labels [N], and `held_out` validation scenes as controls.

    codec: the one they were decoded with, on `device`. The classifier runs on the CPU.
    """
    classes = len(classifier.class_names)
    found = classifier.classify(images)
    real, truth = render("validation", held_out)
    side = images.shape[-1]
    same_side = real if side == SIDE else render("validation", held_out, side)[0]
    return Measurement(
        generated=agreement(found, labels, classes),
        shuffled=agreement(found, shuffled(labels, seed), classes),
        held_out=agreement(classifier.classify(real), truth, classes),
        at_side=agreement(classifier.classify(same_side), truth, classes),
        round_trip=agreement(classifier.classify(round_trip(codec, same_side, device)), truth, classes),
    )


def table(measurement: Measurement, class_names: Sequence[str]) -> str:
    """The measurement as people read it: one line a set of images, then one a class of the generated."""
    lines = [f"{'images':<36}{'count':>6}{'agree':>8}{'lower 95 %':>12}{'chance':>8}{'lower/chance':>14}"]
    lines += [
        f"{what:<36}{a.count:>6}{a.share:>8.1%}{a.lower:>12.1%}{a.chance:>8.2%}{a.ratio:>13.2f}x"
        for what, a in measurement.rows()
    ]
    lines += ["", f"{'class':<24}{'agree':>8}{'of':>6}   most often mistaken for"]
    for label, row in enumerate(measurement.generated.confusion):
        others = [(count, -number) for number, count in enumerate(row) if number != label and count]
        worst = f"{class_names[-max(others)[1]]} ({max(others)[0]})" if others else "-"
        lines.append(f"{class_names[label]:<24}{row[label]:>8}{sum(row):>6}   {worst}")
    return "\n".join(lines)
