"""The process group: starting it, ending it, and the few collectives that the rest of the system asks for.

This package is the only place that knows ranks. Reading the launcher's environment is in
`launch_environment`; DeepSpeed finds the group made here already initialised and uses it. Every helper works,
as a group of one, in a process that never called `initialize`.
"""

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from dsmoe.base.errors import ConfigError, TrainingFailure
from dsmoe.runtime import extension_cache
from dsmoe.runtime.device import Device
from dsmoe.runtime.launch_environment import LaunchPlace, discover, export, stated_rank
from dsmoe.runtime.logging import get_logger

__all__ = [
    "DEFAULT_TIMEOUT",
    "Board",
    "LaunchPlace",
    "Transfer",
    "all_gather_tensor",
    "all_reduce_",
    "all_to_all",
    "barrier",
    "broadcast_object",
    "discover",
    "export",
    "initialize",
    "is_main",
    "on_main",
    "rank",
    "shutdown",
    "start_all_to_all",
    "stated_rank",
    "world_size",
]

DEFAULT_TIMEOUT = timedelta(minutes=10)
_REDUCTIONS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}

_P = ParamSpec("_P")
_R = TypeVar("_R")


def initialize(place: LaunchPlace, device: Device, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
    """Start the default process group (gloo on CPU, NCCL on GPU), a group of one included.

    Also writes the launch variables, gives compiled extensions a folder of this environment's own, tells
    DeepSpeed which device is meant (so call it before deepspeed is imported), and makes `timeout` the time
    limit of every later group, those that DeepSpeed makes included. Raises ConfigError when a group exists
    already.
    """
    if dist.is_initialized():
        raise ConfigError("the process group is initialised already; a process joins one run in its life.")
    export(place, os.environ)
    _tell_deepspeed_device(device)
    cache = extension_cache.use_own_folder(os.environ)
    if place.local_rank == 0:
        for lock in extension_cache.stale_locks(cache):
            get_logger().warning("a compiled extension would wait for ever: %s", lock.advice())
    _limit_every_group(timeout)
    device.make_current()
    if place.world_size == 1:
        # A store in memory: no port to collide on.
        dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    # Binding NCCL to its device lets barrier and sub-groups know it without a guess.
    bound = {"device_id": device.torch_device} if device.kind == "cuda" else {}
    dist.init_process_group(
        device.backend,
        init_method="env://",
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
        **bound,
    )


def shutdown(failed: bool = False) -> None:
    """Leave the process group; a second call does nothing.

    failed: say True when this process comes from an exception: it then leaves at once. Otherwise all ranks
    meet at a barrier first, without which a rank that leaves early can abort its peers at interpreter exit.
    """
    if not dist.is_initialized():
        return
    if not failed:
        barrier()
    elif dist.get_backend() == "nccl" and hasattr(distributed_c10d, "_abort_process_group"):
        # destroy would wait for collectives that the failed peers never join.
        distributed_c10d._abort_process_group()
        return
    dist.destroy_process_group()


def rank(group: ProcessGroup | None = None) -> int:
    """This process's index among all, or within `group`; 0 without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size(group: ProcessGroup | None = None) -> int:
    """Number of processes, or of those in `group`; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def ranks_on_this_host() -> int:
    """Processes that share this host's memory, as the launcher said."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, the one that prints and writes shared files."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_(tensor: torch.Tensor, op: str = "sum", group: ProcessGroup | None = None) -> torch.Tensor:
    """Replace `tensor` on every rank by the sum, mean, max or min over ranks, in place; returns it.

    Any shape, equal on all ranks; any device. "mean" divides the sum by the number of ranks (floating dtypes
    only).
    """
    assert op in _REDUCTIONS, f"unknown reduction {op!r}"
    if world_size(group) == 1:
        return tensor
    staged = _on_group_device(tensor)
    dist.all_reduce(staged, op=_REDUCTIONS[op], group=group)
    if op == "mean":
        staged /= dist.get_world_size(group)
    if staged is not tensor:
        tensor.copy_(staged)
    return tensor


def all_gather_tensor(tensor: torch.Tensor, group: ProcessGroup | None = None) -> list[torch.Tensor]:
    """Every rank's tensor, in rank order, on the caller's device; shape and dtype equal on all ranks."""
    if world_size(group) == 1:
        return [tensor.clone()]
    staged = _on_group_device(tensor)
    gathered = [torch.empty_like(staged) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, staged, group=group)
    return [part.to(tensor.device) for part in gathered]


def all_to_all(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Row r goes to rank r of `group`, row r of the result came from it; [ranks, ...], equal shapes on all ranks."""
    received = torch.empty_like(tensor)
    dist.all_to_all_single(received, tensor.contiguous(), group=group)
    return received


@dataclass
class Transfer:
    """Rows that are arriving: `wait` before they are read."""

    rows: torch.Tensor
    work: dist.Work

    def wait(self) -> torch.Tensor:
        """The rows, once they are here (on a GPU: the stream waits, not the host)."""
        self.work.wait()
        return self.rows


def start_all_to_all(rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: ProcessGroup) -> Transfer:
    """Begin to move rows [sum(send), D]: the first send[0] to rank 0 of `group` and so on; receive[r] come from r."""
    received = rows.new_empty(sum(receive), rows.shape[1])
    work = dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group, async_op=True)
    return Transfer(received, work)


def broadcast_object(value: object, source: int = 0) -> object:
    """`value` of rank `source`, on every rank.

    Plain data only (None, bool, int, float, str, list, dict with str keys): it travels as JSON, never as
    pickle, and is rebuilt from JSON on the source as well, so that all ranks hold the same types (a tuple
    becomes a list).
    """
    text = json.dumps(value) if rank() == source else ""
    if world_size() == 1:
        return json.loads(text)
    payload = torch.tensor(list(text.encode()), dtype=torch.uint8)
    size = _on_group_device(torch.tensor([payload.numel()], dtype=torch.int64))
    dist.broadcast(size, src=source)
    if rank() != source:
        payload = torch.empty(int(size.item()), dtype=torch.uint8)
    payload = _on_group_device(payload)
    dist.broadcast(payload, src=source)
    return json.loads(bytes(payload.tolist()).decode())


class Board:
    """Counters and lines that ranks leave for each other without waiting, for work too uneven for collectives.

    name: boards of one name are one board. It lives in the process group's store, on rank 0: once that has gone every
    call raises TrainingFailure.
    """

    def __init__(self, name: str) -> None:
        store = distributed_c10d._get_default_store() if dist.is_initialized() else dist.HashStore()
        self._store = dist.PrefixStore(name, store)

    def add(self, counter: str, amount: int = 1) -> int:
        """Add to a counter, which begins at 0; its new value. Each value is returned once only, whoever asks."""
        return self._ask(lambda: self._store.add(counter, amount))

    def count(self, counter: str) -> int:
        """Its value now."""
        return self.add(counter, 0)

    def post(self, key: str, line: str) -> None:
        """Leave a line, in place of one that is there."""
        self._ask(lambda: self._store.set(key, line))

    def line(self, key: str) -> str | None:
        """The line left there, None when there is none yet."""
        return self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    @staticmethod
    def _ask(question: Callable[[], _R]) -> _R:
        try:
            return question()
        except dist.DistError as error:
            raise TrainingFailure(
                f"rank 0, which holds the ranks' board, has gone ({type(error).__name__})."
            ) from error


def on_main(function: Callable[_P, _R]) -> Callable[_P, _R | None]:
    """Decorator: rank 0 calls the function, the others return None at once. It does not synchronise."""

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        return function(*args, **kwargs) if is_main() else None

    return wrapper


def _on_group_device(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where the default group can reach it: NCCL moves GPU memory only."""
    staged = tensor.contiguous()
    if dist.get_backend() == "nccl" and not staged.is_cuda:
        return staged.to("cuda")
    return staged


def _tell_deepspeed_device(device: Device) -> None:
    """DeepSpeed picks its accelerator at import by what it finds; a CPU run on a GPU machine must say so."""
    stated = os.environ.setdefault("DS_ACCELERATOR", device.kind)
    if stated != device.kind:
        raise ConfigError(
            f"DS_ACCELERATOR is {stated!r} but the run uses {device.kind!r}; unset it or make them agree."
        )
    if "deepspeed" in sys.modules:
        get_logger().debug("deepspeed was imported before initialize; its choice of accelerator stands")


def _limit_every_group(timeout: timedelta) -> None:
    """Make `timeout` the default of new groups: DeepSpeed makes its data-parallel groups without one.

    They would wait 30 minutes (gloo) or 10 (NCCL) on a lost peer, whatever the default group's limit is.
    torch has no public setting for it; a test on two processes holds that these names still work.
    """
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        if isinstance(getattr(distributed_c10d, name, None), timedelta):
            setattr(distributed_c10d, name, timeout)
        elif name == "default_pg_timeout" or dist.is_nccl_available():
            get_logger().warning(
                "this torch has no distributed_c10d.%s: DeepSpeed's groups keep torch's own time limit",
                name,
            )
