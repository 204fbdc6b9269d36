"""Run by every rank: `run_several.py RUNS`, several launcher runs one after another, which spares their start.

RUNS: JSON list of {"argv": [...], "stop": step in which rank 1 sends itself SIGUSR1, or 0}. Prints one line of JSON:
of every run [exit code, names of the tars that this rank scanned]. All runs share one process group, because DeepSpeed
keeps the groups of the first.
"""

import functools
import json
import os
import signal
import sys

from dsmoe.data import webdataset
from dsmoe.runtime import distributed
from dsmoe.training import loop, pretrain


def main(runs: list[dict]) -> None:
    plain, leave, found = loop.micro_loss, distributed.shutdown, []
    scan, scanned = webdataset.scan_tar, []
    webdataset.scan_tar = lambda shard: scanned.append(shard.name) or scan(shard)
    distributed.initialize = functools.cache(distributed.initialize)
    distributed.shutdown = lambda failed=False: None
    for run in runs:
        calls = iter(range(1, sys.maxsize))

        def interrupted(training, batch, calls=calls, stop=run["stop"]):
            if next(calls) == stop and distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return plain(training, batch)

        loop.micro_loss = interrupted
        scanned.clear()
        found.append([pretrain.main(run["argv"], "several"), list(scanned)])
    leave()
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
