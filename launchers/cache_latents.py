"""Encode a data set once, into a few large files that training reads instead of images; needs no DeepSpeed.

    python launchers/cache_latents.py --out DIR --recipe NAME|FILE [--dtype float32] [--shard-mib 1024] [key=value ...]
    python launchers/cache_latents.py --verify DIR

It takes the recipe's data and codec sections. Under torchrun, deepspeed, mpirun or srun the ranks share the shards.
Killed or stopped (SIGTERM, SIGUSR1: exit code 75), the same command goes on, on any number of ranks, and leaves the
same bytes. Then train with codec.cache=disk codec.cache_path=DIR.
"""

import sys

from dsmoe.evaluation.command import run
from dsmoe.preprocess.cache_command import parser, work

if __name__ == "__main__":
    sys.exit(run(parser(__doc__), sys.argv[1:], work))
