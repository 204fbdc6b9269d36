"""The options of `python -m dsmoe plan`: apart, so that --help imports no torch."""

import argparse

from dsmoe.base.memory import ITEMSIZE

GPU_MEMORY, NVLINK, NETWORK = 80.0, 450.0, 50.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The planner's options."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--preset", metavar="P", help="an architecture by name, trained on ImageNet's 1000 classes")
    model.add_argument("--recipe", metavar="NAME|FILE", help="a recipe: its model, resolution, batch and averages")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="machines")
    parser.add_argument("--gpus", type=int, required=True, metavar="G", help="GPUs in each")
    parser.add_argument("--gpu-memory", type=float, default=GPU_MEMORY, metavar="GIB", help="of one GPU (default 80)")
    parser.add_argument("--global-batch", type=int, metavar="IMAGES", help="a step (default the recipe's, or 256)")
    parser.add_argument("--resolution", type=int, metavar="PX", help="image side (default the recipe's, or 256)")
    parser.add_argument("--precision", choices=tuple(ITEMSIZE), default="bf16", help="of weights (default bf16)")
    parser.add_argument("--zero", type=int, choices=range(4), metavar="S", help="fix the ZeRO stage: 0 to 3")
    parser.add_argument("--expert-parallel", type=int, metavar="E", help="fix the expert-parallel size")
    parser.add_argument("--micro-batch", type=int, metavar="M", help="fix the images a GPU takes at once")
    recompute = parser.add_mutually_exclusive_group()
    recompute.add_argument(
        "--recompute",
        nargs="?",
        const="blocks",
        choices=("blocks", "experts"),
        help="fix what the backward pass computes again: whole blocks (alone), or the inside of the experts",
    )
    recompute.add_argument(
        "--no-recompute", dest="recompute", action="store_const", const=False, help="compute nothing again"
    )
    switch = {"action": argparse.BooleanOptionalAction, "default": None}
    parser.add_argument("--offload", **switch, help="fix whether the optimizer lives in host memory")
    parser.add_argument("--nvlink", type=float, default=NVLINK, metavar="GB/S", help="a GPU sends in its node (450)")
    parser.add_argument("--network", type=float, default=NETWORK, metavar="GB/S", help="a GPU sends out of it (50)")
    parser.add_argument("--top", type=int, default=8, metavar="K", help="layouts to list (default 8)")
    parser.add_argument("--write", metavar="FILE", help="write the recommended layout as a ds_config")
