"""Which checkpoint a run resumes from: the newest whole one, found by all ranks together."""

import torch

from dsmoe.base.errors import CheckpointError
from dsmoe.checkpoint.reader import Reader
from dsmoe.checkpoint.store import Store
from dsmoe.runtime import distributed
from dsmoe.runtime.logging import get_logger

_LINE_BYTES = 400


def newest_whole(store: Store) -> Reader | None:
    """The newest checkpoint whose every byte is as written; None when there is none at all.

    The ranks share the hashing and agree; damaged ones are named and set aside, so that the run can write those
    again. CheckpointError when there are some and all are damaged: starting over is for the user to decide.
    Call with the lease in hand.
    """
    log = get_logger("checkpoint")
    names = distributed.broadcast_object(store.committed())
    damaged = []
    for images_seen in names:
        found = store.damage(images_seen, distributed.rank(), distributed.world_size())
        faults = [line for line in shared_lines(found) if line]
        if not faults:
            for bad in damaged:
                _set_aside(store, bad)
            return Reader(store.path(images_seen))
        damaged.append(images_seen)
        if distributed.is_main():
            log.warning("checkpoint %s is damaged: %s; trying the one before", store.path(images_seen), faults[0])
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {store.root} is damaged (the newest: {store.path(names[0]).name}, {faults[0]}); "
            "restore one from a copy, or remove them to start from the first image."
        )
    return None


@distributed.on_main
def _set_aside(store: Store, images_seen: int) -> None:
    kept = store.set_aside(images_seen)
    get_logger("checkpoint").warning("kept the damaged one as %s", kept.name)


def shared_lines(line: str) -> list[str]:
    """Every rank's line of text, in rank order; cut at 400 bytes."""
    raw = line.encode()[:_LINE_BYTES]
    mine = torch.tensor(list(raw.ljust(_LINE_BYTES, b"\0")), dtype=torch.uint8)
    return [bytes(t.tolist()).rstrip(b"\0").decode(errors="replace") for t in distributed.all_gather_tensor(mine)]
