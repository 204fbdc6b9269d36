"""Do generated scenes show the class they were asked for? docs/class_agreement.md tells what is measured.

    python benchmarks/class_agreement.py --checkpoint RUN|FILE [--samples 512] [--out FILE.json] [--require RATIO]
    python benchmarks/class_agreement.py --train --classifier FILE.safetensors [--epochs N] [--codec NAME]

Exit code 1 when the lower 95 % bound of the agreement is below RATIO times chance. Started by a launcher, the ranks
share the drawing.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from dsmoe.base.command_line import Parser
from dsmoe.base.errors import ConfigError
from dsmoe.codec import build as build_codec
from dsmoe.data.scenes import Scenes
from dsmoe.evaluation import scenes_classifier
from dsmoe.evaluation.class_agreement import Measurement, agreement, balanced_labels, measure, round_trip, table
from dsmoe.evaluation.command import check_output, on_main_for_all, run, whole_file
from dsmoe.evaluation.draw import Trained, add_sampling_options, choose_sampling, describe, open_trained
from dsmoe.evaluation.scenes_classifier import FitProgress, ScenesClassifier
from dsmoe.runtime.device import Device
from dsmoe.runtime.distributed import is_main
from dsmoe.runtime.logging import get_logger
from dsmoe.tasks.class_sampling import Sampling

EXIT_BELOW = 1


def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    add_sampling_options(parser)
    parser.add_argument("--samples", type=int, default=512, metavar="N", help="generated images (default 512)")
    parser.add_argument("--held-out", type=int, default=2048, metavar="N", help="real validation scenes (default 2048)")
    parser.add_argument("--classifier", type=Path, metavar="FILE", help="default: the committed one; --train needs it")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="report with confusion tables")
    parser.add_argument("--require", type=float, metavar="RATIO", help="exit 1 when lower bound < RATIO x chance")
    parser.add_argument("--train", action="store_true", help="train the classifier anew into --classifier and stop")
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="of --train, over --scenes (default 8)")
    parser.add_argument("--scenes", type=int, default=scenes_classifier.TRAIN_SCENES, metavar="N", help="of --train")
    parser.add_argument("--codec", metavar="NAME", help="of --train: show each scene through this codec as well")
    return run(parser, argv, train if "--train" in argv else judge)


def judge(options: argparse.Namespace, device: Device) -> int:
    if options.checkpoint is None:
        raise ConfigError("--checkpoint is missing; give a run folder or a .safetensors file.")
    _positive(options.held_out, "--held-out")
    judge_file = options.classifier or scenes_classifier.WEIGHTS
    classifier, notes = scenes_classifier.load_classifier(judge_file)
    trained = open_trained(options.checkpoint, device)
    plan = trained.plan
    if plan.data.class_names != classifier.class_names:
        raise ConfigError(
            f"{trained.path} was trained on {plan.recipe.data.source} with other classes than the scenes' that "
            f"{judge_file} knows; class agreement needs weights trained on data.source=scenes."
        )
    sampling = choose_sampling(plan, options)
    labels = balanced_labels(options.samples, plan.model.num_classes)
    if options.out is not None:
        on_main_for_all(functools.partial(check_output, options.out, "--out", ".json"))
    get_logger().info("%d images from %s: %s", len(labels), trained.path, describe(sampling))
    images = trained.draw(labels, torch.arange(len(labels)), sampling)
    return on_main_for_all(functools.partial(_report, options, trained, sampling, images, labels, classifier, notes))


def _report(
    options: argparse.Namespace,
    trained: Trained,
    sampling: Sampling,
    images: Tensor,
    labels: Tensor,
    classifier: ScenesClassifier,
    notes: dict[str, str],
) -> int:
    measurement = measure(
        classifier,
        trained.codec,
        images,
        labels,
        held_out=options.held_out,
        seed=sampling.seed,
        device=trained.device,
    )
    print(table(measurement, classifier.class_names), flush=True)
    if options.out is not None:
        content = report_dict(trained, sampling, measurement, notes)
        with whole_file(options.out) as file:
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        get_logger().info("report %s", options.out)
    return _verdict(measurement, options.require)


def _verdict(measurement: Measurement, required: float | None) -> int:
    if required is None:
        return 0
    ratio = measurement.generated.ratio
    met = ratio >= required
    print(f"lower bound is {ratio:.2f}x chance, {required:g}x required: {'met' if met else 'NOT met'}", flush=True)
    return 0 if met else EXIT_BELOW


def report_dict(trained: Trained, sampling: Sampling, measurement: Measurement, classifier: dict[str, str]) -> dict:
    """What a JSON report holds; `classifier` is the metadata of its file."""
    weights, plan = trained.weights, trained.plan
    return {
        "checkpoint": str(trained.path),
        "kind": weights.kind,
        "images_seen": weights.images_seen,
        "recipe": plan.recipe.name,
        "science_hash": plan.science_hash,
        "codec": plan.codec,
        "resolution": plan.recipe.data.resolution,
        "sampling": describe(sampling),
        "class_names": list(plan.data.class_names),
        "classifier": {k: v for k, v in classifier.items() if k != "class_names"},
        "generated": measurement.generated.to_dict(),
        "shuffled": measurement.shuffled.to_dict(),
        "real": measurement.held_out.to_dict(),
        "real_at_resolution": measurement.at_side.to_dict(),
        "real_round_trip": measurement.round_trip.to_dict(),
    }


def train(options: argparse.Namespace, device: Device) -> int:
    """Train on the CPU, print the held-out accuracy and write the file with it."""
    if not is_main():
        return 0
    _positive(options.epochs, "--epochs")
    _positive(options.held_out, "--held-out")
    _positive(options.scenes, "--scenes")
    if options.classifier is None:
        raise ConfigError("--train needs --classifier FILE.safetensors, where to write.")
    check_output(options.classifier, "--classifier", ".safetensors")
    codec = build_codec(options.codec) if options.codec else None
    names = Scenes("train", scenes_classifier.SIDE).class_names
    get_logger().info("rendering %d training and %d validation scenes", options.scenes, options.held_out)
    images, labels = scenes_classifier.render("train", options.scenes)
    held_out, truth = scenes_classifier.render("validation", options.held_out)
    if codec is not None:
        codec.to(device.torch_device)
        images = torch.cat([images, round_trip(codec, images, device.torch_device)])
        labels = torch.cat([labels, labels])
    seed = options.seed or 0
    model = scenes_classifier.fit(images, labels, names, epochs=options.epochs, seed=seed, report=_print_epoch)
    result = agreement(model.classify(held_out), truth, len(names))
    notes = {
        "train_scenes": str(options.scenes),
        "epochs": str(options.epochs),
        "seed": str(seed),
        "codec": f"{options.codec} {codec.provenance['sha256']}" if codec else "not shown",
        "validation_scenes": str(options.held_out),
        "validation_accuracy": f"{result.share:.4f}",
    }
    _save(options.classifier, model, notes)
    print(f"held-out accuracy {result.share:.2%} ({result.agreed} of {result.count}); wrote {options.classifier}")
    return 0


def _save(path: Path, model: ScenesClassifier, notes: dict[str, str]) -> None:
    try:
        scenes_classifier.save_classifier(path, model, notes)
    except OSError as error:
        raise ConfigError(f"--classifier {path} cannot be written ({error.strerror or error}).") from error


def _print_epoch(progress: FitProgress) -> None:
    get_logger().info(
        "epoch %d/%d: loss %.4f, %.2f %% of the worsened training scenes found",
        progress.epoch,
        progress.epochs,
        progress.loss,
        100 * progress.accuracy,
    )


def _positive(value: int, option: str) -> None:
    if value < 1:
        raise ConfigError(f"{option} is {value}; it must be at least 1.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
