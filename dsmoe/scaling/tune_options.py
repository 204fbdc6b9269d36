"""The options of `python -m dsmoe tune`: apart, so that --help imports no torch."""

import argparse

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ROUNDS = 15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, where, and where the findings go."""
    parser.add_argument("--preset", required=True, metavar="P", help="the architecture whose shapes are measured")
    parser.add_argument("--tokens", required=True, type=int, metavar="T", help="tokens a GPU takes at once: images x T")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of weights (default bf16)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU, where there is one")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="measure these alone (default: all that have a choice)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"paired rounds (default {ROUNDS})")
    parser.add_argument("--out", metavar="FILE", help="tuning file (default DSMOE_TUNING, or the user's cache)")
