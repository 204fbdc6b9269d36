"""The same photos as folders, tars and parquet are the same training data: batches, damage, order and resumption."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import pixels, png
from made_shards import three_forms
from shared_data import require

from dsmoe.base.errors import DataError
from dsmoe.data import ImageDataset, build_dataset
from dsmoe.data.loader import BatchLoader
from dsmoe.data.order import BatchLayout, SampleOrder

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
TOTAL, BAD = 31, {4, 5, 17, 30}
FORMS = ("folder", "tar", "parquet")


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    photos = [(f"k{i:03d}", b"no image" if i in BAD else png(i, 12, 8), i // 11) for i in range(TOTAL)]
    return three_forms(tmp_path_factory.mktemp("photos"), photos)


@pytest.fixture(scope="module")
def build(forms: dict[str, tuple[str, Path]]) -> Callable[[str], ImageDataset]:
    def make(form: str) -> ImageDataset:
        source, path = forms[form]
        return build_dataset(source, path=path, resolution=8, max_bad_fraction=0.5)

    return make


def _loader(dataset: ImageDataset, *, world: int = 1, rank: int = 0, micro: int = 12, block: int = 0, **more: object):
    layout = BatchLayout(global_batch=12, micro_batch=micro, world_size=world, rank=rank)
    order = SampleOrder(9, TOTAL, block=block, global_batch=12)
    return BatchLoader(dataset, order, layout, **{"num_steps": 4, "flip": True, **more})


def _samples(loaders: list[BatchLoader]) -> dict[int, tuple[int, int, bytes]]:
    """Sample index -> (item, label, pixels) of everything the loaders give; each index once."""
    found = {}
    for loader in loaders:
        for batch in loader:
            rows = zip(batch.index.tolist(), batch.items.tolist(), batch.labels.tolist(), batch.images, strict=True)
            for n, item, label, image in rows:
                assert n not in found
                found[n] = (item, label, image.numpy().tobytes())
    return found


@pytest.mark.parametrize("block", [0, 4])
def test_every_form_gives_the_same_samples_on_1_2_and_4_ranks_and_after_a_resume(build, block) -> None:
    alone = _samples([_loader(build("folder"), block=block)])
    assert sorted(alone) == list(range(48))
    for form in FORMS:
        for world, micro in [(1, 12), (1, 3), (2, 6), (2, 2), (4, 3), (4, 1)]:
            ranks = [_loader(build(form), world=world, rank=r, micro=micro, block=block) for r in range(world)]
            assert _samples(ranks) == alone, (form, world, micro)
            for ends in (1, 3):  # stopped there, and gone on with other ranks
                first = [_loader(build(form), world=world, rank=r, micro=micro, block=block, num_steps=ends)
                         for r in range(world)]  # fmt: skip
                rest = _loader(build(form), block=block, start_step=ends, num_steps=4 - ends)
                assert _samples([*first, rest]) == alone, (form, world, micro, ends)


@pytest.mark.parametrize("form", FORMS)
def test_damage_is_skipped_counted_and_named_with_and_without_workers(build, form, tmp_path) -> None:
    datasets = {workers: build(form) for workers in (0, 2)}
    samples = {workers: _samples([_loader(dataset, micro=4, workers=workers)]) for workers, dataset in datasets.items()}
    assert samples[0] == samples[2]
    for n, (item, label, _) in samples[0].items():
        given = item
        while given in BAD:
            given = (given + 1) % TOTAL
        assert label == given // 11, n
    assert datasets[2].faults == datasets[0].faults  # counts came back from the workers
    assert {fault.item for fault in datasets[0].faults} == BAD
    assert {fault.reason for fault in datasets[0].faults} == {"not an image"}
    names = {"folder": "000/k004.jpg", "tar": "photos-0000.tar/k004", "parquet": "photos-00000.parquet:4"}
    assert names[form] in {fault.name for fault in datasets[0].faults}


@pytest.mark.parametrize("form", FORMS)
def test_too_much_damage_stops_every_form(forms, form) -> None:
    source, path = forms[form]
    dataset = build_dataset(source, path=path, resolution=8, max_bad_fraction=0.0)
    with pytest.raises(
        DataError, match=r"of \d+ images read from .* are damaged .* the first: .*k?0.* \(not an image\)"
    ):
        _samples([_loader(dataset)])


def _read(dataset: ImageDataset, item: int) -> np.ndarray:
    return dataset.read(item)[0]


def test_forked_processes_open_files_of_their_own(build) -> None:
    """The loader's workers, above, are not forked from here: there the data set has travelled as a pickle."""
    datasets = [build(form) for form in FORMS]
    for dataset in datasets:
        dataset.read(0)  # files are open here by now
    with multiprocessing.get_context("fork").Pool(1) as pool:
        given = pool.starmap(_read, [(dataset, item) for dataset in datasets for item in (29, 0, 16)])
    want = [build("folder").read(item)[0] for item in (29, 0, 16)] * 3
    assert all(np.array_equal(a, b) for a, b in zip(given, want, strict=True))
    for dataset in datasets:
        assert np.array_equal(dataset.read(1)[0], pixels(1, 12, 8)[2:10])


def test_fingerprints_name_the_content(forms, build, tmp_path) -> None:
    prints = {form: build(form).fingerprint for form in FORMS}
    assert len(set(prints.values())) == 3
    photos = [(f"k{i:03d}", b"no image" if i in BAD else png(i, 12, 8), i // 11) for i in range(TOTAL)]
    copies = three_forms(tmp_path / "elsewhere", photos)
    for form, (source, path) in copies.items():
        assert build_dataset(source, path=path, resolution=16).fingerprint == prints[form], form
    relabelled = three_forms(tmp_path / "relabelled", [(key, image, label + 1) for key, image, label in photos])
    renamed = three_forms(tmp_path / "larger", [*photos[:-1], ("k030", png(30, 40, 8), 2)])
    for form in FORMS:
        others = [build_dataset(s, path=p, resolution=8).fingerprint for s, p in (relabelled[form], renamed[form])]
        assert len({prints[form], *others}) == 3, form


def test_blocks_read_row_groups_about_once(tmp_path) -> None:
    """Read amplification (row groups decoded for those there are) of an epoch that the cache does not hold."""
    from dsmoe.data import parquet

    images = [png(i, 8, 8) for i in range(960)]
    path = three_forms(tmp_path, [(f"k{i:03d}", image, 0) for i, image in enumerate(images)], shard=96)["parquet"][1]
    decoded = {}
    for block in (0, 2):
        dataset = build_dataset("parquet", path=path, resolution=8)
        room = sum(len(image) for image in images) // 6
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parquet, "CACHE_BYTES", room)
            order = SampleOrder(0, 960, block=block, global_batch=8)
            for i in order.items(torch.arange(960)).tolist():
                dataset.read(i)
        decoded[block] = dataset.groups_decoded / 480
    assert decoded[0] > 1.5  # groups of two: 2 would be one for each image
    assert decoded[2] < 1.1


def test_real_photos_in_every_form(tmp_path) -> None:
    root = require("imagenet_sample", "train")
    files = sorted(root.glob("*/*"))[:12]
    forms = three_forms(tmp_path, [(file.stem, file.read_bytes(), i) for i, file in enumerate(files)])
    read = {
        form: [build_dataset(s, path=p, resolution=64).read(i) for i in range(12)] for form, (s, p) in forms.items()
    }
    for form in FORMS:
        for (a, label), (b, same) in zip(read[form], read["folder"], strict=True):
            assert np.array_equal(a, b)
            assert label == same
