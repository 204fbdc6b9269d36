"""Run by every rank: `interrupted_run.py SIGNAL RANK STEP argv...` is the launcher; RANK sends itself SIGNAL.

STEP: in the forward pass of which step of this process, from 1; 0 for never.
"""

import os
import signal
import sys

from dsmoe.runtime import distributed
from dsmoe.training import loop, pretrain

SIGNAL, RANK, STEP = signal.Signals[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3])
plain = loop.micro_loss
calls = 0


def interrupted(run, batch):
    global calls
    calls += 1
    if distributed.rank() == RANK and calls == STEP:
        os.kill(os.getpid(), SIGNAL)
    return plain(run, batch)


if __name__ == "__main__":
    loop.micro_loss = interrupted
    sys.exit(pretrain.main(sys.argv[4:], "interrupted"))
