"""Micro-batches of images in training order, read by background processes.

Not here: what the batches hold (order), how an item is read (the data sets).
"""

import multiprocessing
import signal
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dsmoe.base.errors import UserError
from dsmoe.data.dataset import Fault, FaultReporter, ImageDataset
from dsmoe.data.order import BatchLayout, Request, SampleOrder, requests
from dsmoe.data.transforms import hflip


@dataclass(frozen=True)
class Batch:
    """One micro-batch of images.

    images uint8 [B, 3, H, W], mirrored where drawn; labels int64 [B]; index int64 [B] sample indices;
    items int64 [B], the items asked for (a damaged item's image and label are those of its stand-in).
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    items: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """On that device; the copy overlaps with computation when the batch is pinned."""
        return Batch(*(t.to(device, non_blocking=True) for t in self._tensors))

    def pin_memory(self) -> "Batch":
        """In page-locked memory."""
        return Batch(*(t.pin_memory() for t in self._tensors))

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.images, self.labels, self.index, self.items


class BatchLoader:
    """Iterates over one rank's micro-batches: num_steps * layout.accumulation of them, from start_step on.

    flip: mirror half of the samples, drawn by sample index. workers: background processes, 0 reads in this
    one; the batches are the same for any number. prefetch: batches each worker keeps ready. pin_memory:
    batches lie in page-locked memory where an accelerator is present. DataError of the data set is raised
    here, whichever process met it; the global torch generator is left alone. `len` is the number of
    micro-batches.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        order: SampleOrder,
        layout: BatchLayout,
        *,
        start_step: int = 0,
        num_steps: int,
        flip: bool = False,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        assert order.num_items == len(dataset), (order.num_items, len(dataset))
        self._dataset, self._order, self._layout = dataset, order, layout
        self._range = {"start_step": start_step, "num_steps": num_steps, "flip": flip}
        self._reading = {"workers": workers, "prefetch": prefetch, "pin_memory": pin_memory}

    def __len__(self) -> int:
        return self._range["num_steps"] * self._layout.accumulation

    def __iter__(self) -> Generator[Batch, None, None]:
        """Close the generator when not all of it is taken: that ends the workers."""
        wanted = requests(self._order, self._layout, **self._range)
        with closing(read_batches(self._dataset, wanted, **self._reading)) as reads:
            for read in reads:
                if isinstance(self._dataset, FaultReporter):
                    self._dataset.account(len(read.batch.items), read.faults)
                yield read.batch


@dataclass(frozen=True)
class ReadBatch:
    """A batch and the damaged items met while reading it."""

    batch: Batch
    faults: tuple[Fault, ...]

    def pin_memory(self) -> "ReadBatch":
        return ReadBatch(self.batch.pin_memory(), self.faults)


def read_batches(
    dataset: ImageDataset,
    wanted: Iterable[Request],
    *,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Generator[ReadBatch, None, None]:
    """Read the wanted batches, in their order; a UserError met in a worker is raised here as itself.

    Workers start by `forkserver`: they are forked from a fresh, single-threaded process, not from this one,
    whose gloo, NCCL, MPI and CUDA threads may hold locks that a forked child would wait for without end. The
    launching script must guard its main part by `if __name__ == "__main__"`, because each worker imports it.
    """
    several = {}
    if workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # torch is imported once and its pages are shared
        several = {
            "multiprocessing_context": context,
            "prefetch_factor": prefetch,
            "worker_init_fn": _leave_stopping_to_the_trainer,
        }
    loader = DataLoader(
        _Reader(dataset),
        batch_size=None,
        sampler=wanted,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else starting an epoch draws from the global one
        **several,
    )
    answers = iter(loader)
    try:
        for answer in answers:
            if isinstance(answer, UserError):
                raise answer
            yield answer
    finally:
        # Ends the workers, also when the caller closes this generator early. Left to the interpreter's exit they
        # would be sent SIGTERM, which they ignore, and waited for without end.
        del answers


class _Reader(Dataset):
    """Turns one Request into a ReadBatch, in whichever process.

    A UserError is handed over as a value: raised, torch would rebuild it around the worker's traceback.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, wanted: Request) -> ReadBatch | UserError:
        try:
            pairs = [self._dataset.read(item) for item in wanted.items.tolist()]
        except UserError as error:
            return error
        flips = wanted.flips.tolist()
        images = [hflip(image) if flip else image for (image, _), flip in zip(pairs, flips, strict=True)]
        batch = Batch(
            images=torch.from_numpy(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))),
            labels=torch.tensor([label for _, label in pairs]),
            index=wanted.index,
            items=wanted.items,
        )
        faults = self._dataset.drain_faults() if isinstance(self._dataset, FaultReporter) else ()
        return ReadBatch(batch, faults)


def _leave_stopping_to_the_trainer(_: int) -> None:
    """Outlive the signals that ask a job to stop: schedulers send them to every process, and the trainer still has a
    step to finish and a checkpoint to write. Workers end when it tells them to, or when it is gone.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _as_is(answer: ReadBatch | UserError) -> ReadBatch | UserError:
    return answer
