import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import good_and_bad, pixels
from shared_data import require
from torch import Tensor, nn

from dsmoe import codec as codecs
from dsmoe.base.diffusion import DiffusionSpec
from dsmoe.base.errors import ConfigError, DataError
from dsmoe.codec.protocol import Posterior
from dsmoe.data.image_folder import ImageFolder
from dsmoe.data.loader import BatchLoader
from dsmoe.data.order import BatchLayout, SampleOrder
from dsmoe.preprocess.memory import EncodeProgress, Sharing, encode_dataset, latent_bytes, posterior_of
from dsmoe.tasks.class_conditional import ClassConditional

CLASSES = 3


class Noise:
    """An in-memory data set of random images, three classes."""

    num_classes = CLASSES
    class_names = ("a", "b", "c")

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def read(self, i: int) -> tuple[np.ndarray, int]:
        return pixels(i, 8, 8), i % CLASSES


@dataclass
class Halving:
    """A codec whose result for an image cannot depend on its batch: even pixels are the mean, odd ones the std."""

    channels: int = 3
    factor: int = 2
    encoded: int = 0

    def encode(self, images: Tensor) -> Posterior:
        self.encoded += len(images)
        return Posterior(images[..., ::2, ::2].clone(), images[..., 1::2, 1::2].abs())


def _layout(micro: int = 6, world: int = 1, rank: int = 0) -> BatchLayout:
    return BatchLayout(global_batch=12, micro_batch=micro, world_size=world, rank=rank)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 1)])
def test_memory_and_images_give_the_same_micro_batches(flip: bool, world: int, rank: int) -> None:
    dataset, codec = Noise(20), Halving()
    store = encode_dataset(dataset, codec, resolution=8, flip=flip, batch_size=7)
    assert codec.encoded == 20 * (2 if flip else 1)
    order, layout = SampleOrder(4, 20), _layout(3, world, rank)
    span = {"start_step": 1, "num_steps": 4, "flip": flip}
    images = list(BatchLoader(dataset, order, layout, **span))
    latents = list(store.micro_batches(order, layout, **span))
    assert len(images) == 16 // world
    for a, b in zip(images, latents, strict=True):
        for name in ("labels", "index", "items"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        want, got = posterior_of(a, codec), posterior_of(b, codec)
        assert torch.equal(want.mean, got.mean)
        assert torch.equal(want.std, got.std)
        assert got.mean.dtype == torch.float32


def _train(batches: object, codec: Halving) -> Tensor:
    """Weights of a small noise predictor after a few steps of plain gradient descent."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 3, 3, padding=1)
    task = ClassConditional(num_classes=CLASSES, label_dropout=0.1, seed=2, diffusion=DiffusionSpec())
    for batch in batches:
        inputs = task.training_inputs(posterior_of(batch, codec), batch.labels, batch.index)
        keep = (1 - inputs.t / 1000)[:, None, None, None]
        mixed = keep * inputs.x0 + (1 - keep) * inputs.noise
        loss = ((model(mixed) + inputs.y[:, None, None, None] - inputs.noise) ** 2).mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_from_memory_is_the_run_from_images() -> None:
    dataset, codec, order = Noise(20), Halving(), SampleOrder(4, 20)
    store = encode_dataset(dataset, codec, resolution=8, flip=True)
    span = {"num_steps": 5, "flip": True}
    from_images = _train(BatchLoader(dataset, order, _layout(), **span), codec)
    from_memory = _train(store.micro_batches(order, _layout(), **span), codec)
    assert torch.equal(from_images, from_memory)
    other_seed = _train(store.micro_batches(SampleOrder(5, 20), _layout(), **span), codec)
    assert not torch.equal(from_images, other_seed)


def _encode_on_ranks(total: int, world: int) -> tuple[list, list[int]]:
    """encode_dataset on `world` threads that exchange like ranks; the stores and how many images each encoded."""
    barrier, slots = threading.Barrier(world, timeout=20), [None] * world
    stores, counts = [None] * world, [0] * world

    def run(rank: int) -> None:
        def exchange(share: Tensor) -> Tensor:
            slots[rank] = share
            barrier.wait()
            gathered = torch.cat(slots)
            barrier.wait()
            return gathered

        codec = Halving()
        sharing = Sharing(rank=rank, world_size=world, exchange=exchange)
        stores[rank] = encode_dataset(Noise(total), codec, resolution=8, flip=True, sharing=sharing)
        counts[rank] = codec.encoded // 2

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return stores, counts


@pytest.mark.parametrize(("total", "world", "shares"), [(10, 4, [3, 3, 3, 1]), (4, 3, [2, 2, 0]), (2, 3, [1, 1, 0])])
def test_ranks_share_the_work_and_all_hold_everything(total: int, world: int, shares: list[int]) -> None:
    alone = encode_dataset(Noise(total), Halving(), resolution=8, flip=True)
    stores, counts = _encode_on_ranks(total, world)
    assert counts == shares
    for store in stores:
        assert len(store) == total
        for name in ("mean", "std", "labels"):
            assert torch.equal(getattr(store, name), getattr(alone, name)), name


def test_stored_views(tmp_path: Path) -> None:
    store = encode_dataset(Noise(5), Halving(), resolution=8, flip=True)
    got = store.batch(torch.tensor([70, 71]), torch.tensor([3, 3]), torch.tensor([False, True]))
    plain = torch.from_numpy(pixels(3, 8, 8).transpose(2, 0, 1).copy()).double() / 127.5 - 1
    # to_float rounds twice in float32 at values up to 2.
    assert torch.allclose(got.posterior.mean[0].double(), plain[:, ::2, ::2], rtol=0, atol=2**-22)
    assert torch.allclose(got.posterior.mean[1].double(), plain.flip(-1)[:, ::2, ::2], rtol=0, atol=2**-22)
    assert got.labels.tolist() == [0, 0]
    assert (got.index.tolist(), got.items.tolist()) == ([70, 71], [3, 3])
    moved = got.to("meta")
    assert {moved.posterior.mean.device.type, moved.posterior.std.device.type, moved.items.device.type} == {"meta"}


def test_mirrored_latents_need_a_store_with_flip() -> None:
    store = encode_dataset(Noise(5), Halving(), resolution=8)
    with pytest.raises(AssertionError, match="without flip"):
        store.batch(torch.tensor([0]), torch.tensor([0]), torch.tensor([True]))


def test_budget_is_checked_before_anything_is_read() -> None:
    class Unread(Noise):
        def read(self, i: int) -> tuple[np.ndarray, int]:
            raise AssertionError("read")

    needed = 1000 * 3 * 4 * 4 * 4 * 2 * 2  # items, channels, side, side, bytes, mean and std, views
    assert latent_bytes(1000, 8, Halving(), True) == needed
    store = encode_dataset(Noise(5), Halving(), resolution=8, flip=True, budget=needed // 200)
    assert store.mean.nbytes + store.std.nbytes == needed // 200
    with pytest.raises(ConfigError, match=r"0\.000715 GiB in each process for 1000 images .* codec\.cache=none"):
        encode_dataset(Unread(1000), Halving(), resolution=8, flip=True, budget=needed - 1)


def test_progress() -> None:
    seen: list[EncodeProgress] = []
    encode_dataset(Noise(10), Halving(), resolution=8, batch_size=4, progress=seen.append)
    assert [(p.done, p.total) for p in seen] == [(4, 10), (8, 10), (10, 10)]
    assert all(p.rate > 0 for p in seen)
    assert seen[0].eta == pytest.approx(6 / seen[0].rate)
    assert seen[-1].eta == 0


def test_damaged_items_are_stood_in_for_and_workers_change_nothing(tmp_path: Path) -> None:
    root = good_and_bad(tmp_path, 20, {3, 4, 19})
    stores, faults = [], []
    for workers in (0, 2):
        dataset = ImageFolder(root, 8, max_bad_fraction=0.2)
        stores.append(encode_dataset(dataset, Halving(), resolution=8, batch_size=6, workers=workers))
        faults.append({fault.item for fault in dataset.faults})
    assert torch.equal(stores[0].mean, stores[1].mean)
    assert torch.equal(stores[0].labels, stores[1].labels)
    assert faults == [{3, 4, 19}] * 2
    for item, given in {3: 5, 4: 5, 19: 0}.items():
        assert torch.equal(stores[0].mean[item], stores[0].mean[given])
        assert stores[0].labels[item] == stores[0].labels[given]


def test_all_ranks_refuse_the_same_damage(tmp_path: Path) -> None:
    """All damage lies in the first rank's share; a replayed exchange lets each rank run alone."""
    root = good_and_bad(tmp_path, 40, set(range(12)))

    class Stop(Exception):
        pass

    def share_of(rank: int) -> Tensor:
        kept = []

        def exchange(share: Tensor) -> Tensor:
            kept.append(share)
            raise Stop

        with pytest.raises(Stop):
            encode_dataset(
                ImageFolder(root, 8),
                Halving(),
                resolution=8,
                sharing=Sharing(rank=rank, world_size=2, exchange=exchange),
            )
        return kept[0]

    gathered = torch.cat([share_of(0), share_of(1)])
    lines = []
    for rank in range(2):
        sharing = Sharing(rank=rank, world_size=2, exchange=lambda share: gathered)
        with pytest.raises(DataError) as caught:
            encode_dataset(ImageFolder(root, 8), Halving(), resolution=8, sharing=sharing)
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert "12 of 40 images read" in lines[0]


def test_real_photos_through_taesd(tmp_path: Path) -> None:
    for folder in sorted(require("imagenet_sample", "train").iterdir())[:10]:
        (tmp_path / folder.name).symlink_to(folder)
    dataset = ImageFolder(tmp_path, 64)
    codec = codecs.build("taesd", require("taesd"))
    store = encode_dataset(dataset, codec, resolution=64, flip=True, batch_size=4)
    assert store.mean.shape == (10, 2, 4, 8, 8)
    order = SampleOrder(0, 10)
    span = {"num_steps": 2, "flip": True}
    for a, b in zip(
        BatchLoader(dataset, order, _layout(), **span), store.micro_batches(order, _layout(), **span), strict=True
    ):
        want = posterior_of(a, codec).mean
        # Convolutions may sum in another order for another batch size.
        assert (want - b.posterior.mean).abs().max() <= 1e-5 * want.abs().max()
