"""Train our own KL autoencoder on the embedded scenes: see docs/codecs.md. One process on a CPU, no DeepSpeed."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from dsmoe.base.errors import EXIT_BAD_INPUT, ConfigError, UserError
from dsmoe.codec.fit import STATE_FILE, WEIGHTS_FILE, FitOptions, Fitter, Pictures, Progress, run
from dsmoe.codec.kl import FACTOR
from dsmoe.data.scenes import SceneFrames, Scenes

LOG_FILE = "metrics.jsonl"
_LABELLED = 4  # one label picture (depth, flow, object, mask) for each four photographs


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--images", type=int, help="pictures to train on (repeatable result)")
    length.add_argument("--minutes", type=float, help="wall minutes to train for instead (not repeatable)")
    parser.add_argument("--out", type=Path, default=Path("runs/codec"), help="folder of weights, state and log")
    parser.add_argument("--resolution", type=int, default=64, help="side; one in four steps uses twice this side")
    parser.add_argument("--scenes", type=int, default=16384, help="scenes rendered at that side, before training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue the training in --out")
    options = parser.parse_args(argv)
    if options.images is None and options.minutes is None:
        options.images = 250_000
    return options


def label_picture(frames: SceneFrames, i: int) -> np.ndarray:
    """uint8 [H, W, 3]: depth, flow, the object on white or its mask, so that the perception tasks' pictures fit too."""
    kind = i % 4
    if kind == 2:
        return np.where(frames.visible[..., None], frames.image, 255).astype(np.uint8)
    if kind == 0:
        low, high = np.quantile(frames.depth, (0.02, 0.98))
        value = (frames.depth - low) / max(high - low, 1e-6)
    elif kind == 1:
        component = frames.flow[..., i // 4 % 2]
        value = 0.5 + 0.5 * component / max(float(np.abs(frames.flow).max()), 1e-6)
    else:
        value = frames.visible.astype(np.float32)
    grey = np.rint(255 * np.clip(value, 0, 1)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def pictures(split: str, resolution: int, count: int, labelled: int) -> torch.Tensor:
    """`count` scenes and then `labelled` label pictures of the same scenes, uint8 [N, H, W, 3]."""
    scenes = Scenes(split, resolution, max(count, labelled))
    images = [scenes.read(i)[0] for i in range(count)]
    images += [label_picture(scenes.read_full(i), i) for i in range(labelled)]
    return torch.from_numpy(np.stack(images))


def prepare(options: argparse.Namespace) -> Fitter:
    if options.resolution % FACTOR:
        raise ConfigError(f"--resolution {options.resolution} is not a multiple of {FACTOR}; take 64")
    if options.scenes < 16:
        raise ConfigError(f"--scenes {options.scenes} is too few to train on; give 16 or more")
    state = options.out / STATE_FILE
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a file; give a folder")
    if state.exists() and not options.resume:
        raise ConfigError(f"{options.out} holds a training already; add --resume or choose another --out")
    if options.resume and not state.exists():
        raise ConfigError(f"{options.out} holds no {STATE_FILE} to resume from; leave out --resume")
    fit_options = FitOptions(images=options.images, minutes=options.minutes, seed=options.seed)
    count, side = options.scenes, options.resolution
    print(f"rendering {count} scenes at {side} px and {count // 4} at {2 * side} px", flush=True)
    fitter = Fitter(
        fit_options,
        Pictures(
            base=pictures("train", side, count, count // _LABELLED),
            large=pictures("train", 2 * side, count // 4, count // 4 // _LABELLED),
            held_out=pictures("validation", side, 256, 0),
        ),
    )
    if options.resume:
        fitter.load_state(state)
    return fitter


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    try:
        fitter = prepare(options)
        options.out.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    notes = {"resolution": str(options.resolution), "scenes": str(options.scenes), "seed": str(options.seed)}
    with (options.out / LOG_FILE).open("a") as log:

        def report(progress: Progress) -> None:
            log.write(json.dumps(asdict(progress)) + "\n")
            log.flush()
            losses = "  ".join(f"{name} {value:.4f}" for name, value in progress.losses.items())
            quality = "" if progress.psnr is None else f"  PSNR {progress.psnr:.2f} dB"
            print(
                f"{progress.images} images ({100 * progress.share:.1f} %)  {progress.rate:.0f} images/s  "
                f"{losses}{quality}  {progress.remaining_s / 60:.0f} min left",
                flush=True,
            )

        run(fitter, options.out, notes, report)
    print(f"weights: {options.out / WEIGHTS_FILE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
