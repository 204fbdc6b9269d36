"""Run by every rank: `faulty_run.py KIND RANK STEP argv...` is the launcher with a fault planted on RANK at STEP.

KIND: loss (its value becomes NaN), gradient (NaN in one element of the last block's output gradient), crash.
"""

import sys

import torch

from dsmoe.runtime import distributed
from dsmoe.training import loop, pretrain

KIND, RANK, STEP = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
plain = loop.micro_loss
calls = 0


def poison(module, inputs, output):
    def replace(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[-1] = torch.nan
        return gradient

    output[0].register_hook(replace)


def planted(run, batch):
    global calls
    calls += 1
    if distributed.rank() != RANK or calls != STEP:
        return plain(run, batch)
    if KIND == "crash":
        raise RuntimeError("planted crash\nwith a second line")
    if KIND == "loss":
        loss, measured, stats = plain(run, batch)
        return loss * torch.nan, measured * torch.nan, stats
    handle = run.engine.model.blocks[-1].register_forward_hook(poison)
    result = plain(run, batch)
    handle.remove()
    return result


loop.micro_loss = planted
sys.exit(pretrain.main(sys.argv[4:], "faulty"))
