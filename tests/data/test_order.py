import pytest
import torch

from dsmoe.base.errors import ConfigError
from dsmoe.data.order import BatchLayout, SampleOrder, micro_batch, requests


def test_each_epoch_shows_every_item_once_in_its_own_order() -> None:
    order = SampleOrder(seed=3, num_items=101)
    items = order.items(torch.arange(5 * 101)).view(5, 101)
    for epoch in items:
        assert sorted(epoch.tolist()) == list(range(101))
    assert len({tuple(epoch.tolist()) for epoch in items}) == 5
    assert items.dtype == torch.int64


def test_order_depends_on_the_seed() -> None:
    n = torch.arange(50)
    assert not torch.equal(SampleOrder(0, 50).items(n), SampleOrder(1, 50).items(n))
    assert torch.equal(SampleOrder(0, 50).items(n), SampleOrder(0, 50).items(n))


def test_order_is_a_function_of_the_index_however_it_is_asked() -> None:
    n = torch.arange(300)
    whole = SampleOrder(7, 40).items(n)
    one = SampleOrder(7, 40)
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for i in shuffled.tolist():
        assert one.items(n[i : i + 1]).item() == whole[i]
    assert torch.equal(SampleOrder(7, 40).items(shuffled), whole[shuffled])


def test_cache_holds_two_epochs() -> None:
    order = SampleOrder(0, 10)
    order.items(torch.arange(95))
    assert sorted(order._epochs) == [8, 9]


def test_far_index() -> None:
    order = SampleOrder(0, 10)
    n = 10 * (2**31) + torch.arange(10)
    assert sorted(order.items(n).tolist()) == list(range(10))


def test_positions_are_unbiased() -> None:
    """Item 0's place over 4000 epochs of 8 is uniform: chi-square of 7 degrees, 1e-6 quantile 40.5."""
    items = SampleOrder(11, 8).items(torch.arange(8 * 4000)).view(4000, 8)
    places = torch.bincount((items == 0).int().argmax(1), minlength=8).double()
    assert ((places - 500) ** 2 / 500).sum() < 40.5


def test_slots_of_the_global_batch() -> None:
    assert micro_batch(2, 1, 3, world=4, micro=5, global_batch=120).tolist() == list(range(275, 280))


@pytest.mark.parametrize(("world", "micro"), [(1, 24), (1, 3), (2, 4), (4, 6), (4, 1), (24, 1)])
def test_ranks_and_micro_batches_tile_the_step_in_order(world: int, micro: int) -> None:
    accumulation = 24 // (world * micro)
    slots = [
        n
        for a in range(accumulation)
        for rank in range(world)
        for n in micro_batch(5, a, rank, world, micro, 24).tolist()
    ]
    assert slots == list(range(120, 144))
    assert BatchLayout(global_batch=24, micro_batch=micro, world_size=world).accumulation == accumulation


@pytest.mark.parametrize("layout", [(10, 4, 1), (8, 4, 4), (8, 0, 1), (0, 1, 1)])
def test_impossible_batch_arithmetic(layout: tuple[int, int, int]) -> None:
    size, micro, world = layout
    with pytest.raises(ConfigError, match=f"global_batch {size} is not a multiple of micro-batch {micro} x {world}"):
        BatchLayout(global_batch=size, micro_batch=micro, world_size=world)


def _draws(world: int, micro: int, flip: bool = True) -> dict[int, tuple[int, bool]]:
    drawn = {}
    for rank in range(world):
        layout = BatchLayout(global_batch=24, micro_batch=micro, world_size=world, rank=rank)
        for want in requests(SampleOrder(5, 31), layout, start_step=3, num_steps=4, flip=flip):
            rows = zip(want.index.tolist(), want.items.tolist(), want.flips.tolist(), strict=True)
            drawn.update({n: (item, mirrored) for n, item, mirrored in rows})
    return drawn


def test_requests_do_not_depend_on_the_layout() -> None:
    alone = _draws(1, 24)
    assert sorted(alone) == list(range(72, 168))
    for world, micro in [(1, 2), (2, 4), (4, 6)]:
        assert _draws(world, micro) == alone


def test_flips_are_fair_and_optional() -> None:
    mirrored = sum(flip for _, flip in _draws(1, 24).values())
    assert 28 < mirrored < 68  # 96 fair coins: mean 48, 4 standard deviations are 20
    assert not any(flip for _, flip in _draws(1, 24, flip=False).values())


def test_resuming_continues_the_same_sequence() -> None:
    layout = BatchLayout(global_batch=6, micro_batch=3)
    whole = list(requests(SampleOrder(1, 10), layout, start_step=0, num_steps=6, flip=True))
    rest = list(requests(SampleOrder(1, 10), layout, start_step=4, num_steps=2, flip=True))
    for a, b in zip(whole[8:], rest, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.items, b.items)
        assert torch.equal(a.flips, b.flips)
