import gc
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from made_images import good_and_bad, pixels
from shared_data import require

from dsmoe.base.errors import DataError
from dsmoe.data.image_folder import ImageFolder
from dsmoe.data.loader import Batch, BatchLoader
from dsmoe.data.order import BatchLayout, SampleOrder

TOTAL = 31
BAD = {4, 5, 17, 30}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_and_bad(tmp_path_factory.mktemp("images"), TOTAL, BAD)


def _loader(root: Path, *, world: int = 1, rank: int = 0, micro: int = 12, **options: object) -> BatchLoader:
    dataset = ImageFolder(root, 8, max_bad_fraction=0.5)
    layout = BatchLayout(global_batch=12, micro_batch=micro, world_size=world, rank=rank)
    return BatchLoader(dataset, SampleOrder(9, TOTAL), layout, **{"num_steps": 4, "flip": True, **options})


def _samples(loaders: list[BatchLoader]) -> dict[int, tuple[int, int, bytes]]:
    """Sample index -> (item, label, pixels) of everything the loaders give; each index once."""
    found = {}
    for loader in loaders:
        for batch in loader:
            for n, item, label, image in zip(
                batch.index.tolist(), batch.items.tolist(), batch.labels.tolist(), batch.images, strict=True
            ):
                assert n not in found
                found[n] = (item, label, image.numpy().tobytes())
    return found


def test_batches_hold_the_right_pixels_labels_and_flips(root: Path) -> None:
    loader = _loader(root, micro=4)
    batches = list(loader)
    assert len(batches) == len(loader) == 12
    mirrored = 0
    for batch in batches:
        assert batch.images.shape == (4, 3, 8, 8)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        assert {t.dtype for t in (batch.labels, batch.index, batch.items)} == {torch.int64}
        for image, label, item in zip(batch.images, batch.labels.tolist(), batch.items.tolist(), strict=True):
            given = item
            while given in BAD:
                given = (given + 1) % TOTAL
            want = pixels(given, 8, 8).transpose(2, 0, 1)
            flipped = np.array_equal(image, want[..., ::-1])
            assert flipped or np.array_equal(image, want)
            assert label == given // 11
            mirrored += flipped
    assert 12 < mirrored < 36  # 48 fair coins, 3.5 standard deviations
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(48))


@pytest.mark.parametrize(("world", "micro"), [(1, 3), (2, 6), (4, 1)])
def test_any_layout_gives_the_same_samples(root: Path, world: int, micro: int) -> None:
    alone = _samples([_loader(root)])
    assert _samples([_loader(root, world=world, rank=r, micro=micro) for r in range(world)]) == alone


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(root: Path, workers: int) -> None:
    alone, helped = _loader(root, micro=4), _loader(root, micro=4, workers=workers)
    for a, b in zip(alone, helped, strict=True):
        for name in ("images", "labels", "index", "items"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert helped._dataset.faults == alone._dataset.faults  # counts came back from the workers
    assert {fault.item for fault in alone._dataset.faults} == BAD


def test_resuming_continues(root: Path) -> None:
    whole = _samples([_loader(root, num_steps=4)])
    halves = [_loader(root, num_steps=2), _loader(root, start_step=2, num_steps=2)]
    assert _samples(halves) == whole


def test_flip_is_optional(root: Path) -> None:
    for item, label, image in _samples([_loader(root, flip=False)]).values():
        if item not in BAD:
            assert image == pixels(item, 8, 8).transpose(2, 0, 1).tobytes()
            assert label == item // 11


def test_global_generator_is_left_alone(root: Path) -> None:
    before = torch.get_rng_state()
    list(_loader(root))
    list(_loader(root, workers=1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_data_errors_surface_as_their_one_line(tmp_path: Path, workers: int) -> None:
    dataset = ImageFolder(good_and_bad(tmp_path, 12, set()), 8)
    victim = SampleOrder(0, 12).items(torch.tensor([7])).item()
    (tmp_path / dataset.name(victim)).unlink()
    layout = BatchLayout(global_batch=2, micro_batch=2)
    loader = iter(BatchLoader(dataset, SampleOrder(0, 12), layout, num_steps=6, workers=workers))
    assert [next(loader).index.tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(DataError) as caught:
        next(loader)
    assert str(caught.value).startswith(f"cannot read '{tmp_path / dataset.name(victim)}': No such file")
    assert "Traceback" not in str(caught.value)


def _drain(batches: BatchLoader, into: list[Batch]) -> None:
    for batch in batches:
        into.append(batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_files_stop_at_the_same_batch(tmp_path: Path, workers: int) -> None:
    dataset = ImageFolder(good_and_bad(tmp_path, 60, set(range(0, 60, 3))), 8, max_bad_fraction=0.2)
    order = SampleOrder(0, 60)
    bad = (order.items(torch.arange(60)) % 3 == 0).cumsum(0)
    layout = BatchLayout(global_batch=5, micro_batch=5)
    batches = BatchLoader(dataset, order, layout, num_steps=12, workers=workers)
    given: list[Batch] = []
    with pytest.raises(DataError, match=r"of \d+ images read .* are damaged"):
        _drain(batches, given)
    # The first batch after which at least ten, and more than a fifth, were damaged.
    judged = next(b for b in range(12) if bad[5 * b + 4] >= 10 and bad[5 * b + 4] > 0.2 * (5 * b + 5))
    assert len(given) == judged


def test_workers_start_after_gloo_and_end_with_the_loop(root: Path, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(3))
        batches = iter(_loader(root, micro=4, workers=2))
        next(batches)
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        assert all("ForkServer" in type(worker).__name__ for worker in workers)
        del batches
        gc.collect()
        assert multiprocessing.active_children() == []
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_job_leaves_the_workers_reading(root: Path, number: int) -> None:
    batches = iter(_loader(root, micro=4, workers=2))
    given = [next(batches)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
    given += list(batches)
    assert len(given) == 12
    del batches
    gc.collect()
    assert multiprocessing.active_children() == []


def test_a_batch_moves_whole() -> None:
    batch = Batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.ones(2), torch.arange(2), torch.arange(2))
    moved = batch.to("meta")
    assert {t.device.type for t in moved._tensors} == {"meta"}
    assert moved.images.shape == batch.images.shape


def test_real_photos_with_workers() -> None:
    dataset = ImageFolder(require("imagenet_sample", "train"), 64)
    layout = BatchLayout(global_batch=16, micro_batch=8)
    order = SampleOrder(1, len(dataset))
    batches = list(BatchLoader(dataset, order, layout, num_steps=2, workers=2))
    assert torch.equal(torch.cat([b.labels for b in batches]), order.items(torch.arange(32)))
    assert all(image.float().std() > 5 for b in batches for image in b.images)
