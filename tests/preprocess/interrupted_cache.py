"""Run by every rank: `interrupted_cache.py SIGNAL RANK BATCH argv...` is the launcher; RANK sends itself SIGNAL.

BATCH: at which encoding batch of this process, from 1; 0 for never.
"""

import os
import signal
import sys

from dsmoe.evaluation.command import run
from dsmoe.preprocess import cache_build
from dsmoe.preprocess.cache_command import parser, work
from dsmoe.runtime import distributed

SIGNAL, RANK, BATCH = signal.Signals[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3])
plain = cache_build.encode_views
calls = 0


def interrupted(codec, images, views):
    global calls
    calls += 1
    if distributed.rank() == RANK and calls == BATCH:
        os.kill(os.getpid(), SIGNAL)
    return plain(codec, images, views)


if __name__ == "__main__":
    cache_build.encode_views = interrupted
    sys.exit(run(parser("interrupted"), sys.argv[4:], work))
