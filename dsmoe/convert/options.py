"""The options of `python -m dsmoe convert`, and those that `launchers/sample.py` shares: apart, so that --help
imports no torch."""

import argparse
from pathlib import Path


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """What weights do not show of themselves."""
    group = parser.add_argument_group("weights of other origin")
    group.add_argument(
        "--from", dest="stated", metavar="FORMAT", help="dit, sit, dit-moe, generalist, diffusers, dsmoe"
    )
    group.add_argument("--kind", metavar="ema|model", help="which weights of a file or run (default: its average)")
    group.add_argument("--objective", metavar="NAME", help="what they predict: ddpm, flow, sit, v, cosine")
    group.add_argument("--preset", metavar="P", help="the architecture's name, checked against the shapes")
    group.add_argument("--heads", type=int, metavar="N", help="attention heads, where no preset tells")
    group.add_argument("--top-k", type=int, metavar="N", help="experts a token visits, where no preset tells")
    group.add_argument("--num-classes", type=int, metavar="N", help="labels without the null one, if rows do not tell")
    group.add_argument("--size", type=int, metavar="PX", help="image side, if not that of their position embedding")
    group.add_argument("--codec", metavar="NAME", help="the autoencoder of their latents (default: sd, or the plan's)")
    group.add_argument("--codec-path", metavar="PATH", help="where it lies (also: where the run's own has moved to)")
    group.add_argument("--label-map", metavar="FILE", help="names of the classes: JSON, or one a line")
    group.add_argument(
        "--trust-pickle",
        action="store_true",
        help="read files that hold pickled classes (DeepSpeed's do): as inert stand-ins, their code is not run",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of the converter."""
    parser.add_argument("source", type=Path, metavar="SRC", help="a file or folder; recognised by its content")
    parser.add_argument("target", type=Path, metavar="DST", help="what to write; it must not exist yet")
    parser.add_argument(
        "--to", metavar="FORMAT", help="dsmoe, dit, sit, dit-moe, generalist, diffusers (default: by DST's ending)"
    )
    parser.add_argument("--dtype", metavar="D", help="fp32, bf16 or fp16 (default: as stored)")
    parser.add_argument(
        "--drop-selection-bias", action="store_true", help="write a published format without our selection biases"
    )
    add_reading_options(parser)
