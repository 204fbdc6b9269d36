import pytest
import torch

from dsmoe.base.errors import ConfigError
from dsmoe.data.order import WINDOW_BLOCKS, BatchLayout, SampleOrder, micro_batch, requests
from dsmoe.ops.random import permutation


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
    assert micro_batch(2, 1, 3, world=4, micro=5, global_batch=120).tolist() == list(range(335, 340))


@pytest.mark.parametrize(("world", "micro"), [(1, 24), (1, 3), (2, 4), (4, 6), (4, 1), (24, 1)])
def test_ranks_and_micro_batches_tile_the_step_in_order(world: int, micro: int) -> None:
    accumulation = 24 // (world * micro)
    slots = [
        n
        for rank in range(world)
        for a in range(accumulation)
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


BLOCKWISE = [(1000, 24, 10), (997, 24, 10), (50, 24, 10), (24 * 40, 24, 40), (1000, 7, 1), (300, 128, 1000)]


@pytest.mark.parametrize(("total", "batch", "block"), BLOCKWISE)
def test_blocks_show_every_item_once_an_epoch(total: int, batch: int, block: int) -> None:
    order = SampleOrder(3, total, block=block, global_batch=batch)
    items = order.items(torch.arange(4 * total)).view(4, total)
    for epoch in items:
        assert sorted(epoch.tolist()) == list(range(total))
    assert len({tuple(epoch.tolist()) for epoch in items}) == 4
    n = torch.randperm(4 * total, generator=torch.Generator().manual_seed(0))
    assert torch.equal(SampleOrder(3, total, block=block, global_batch=batch).items(n), items.flatten()[n])


def _slow_blockwise(order: SampleOrder, epoch: int) -> list[int]:
    """The same order by loops over what the words say; only the two permutations are shared."""
    total, block = order.num_items, order.block
    sequence = []
    for b in permutation(order.seed, epoch, -(-total // block), purpose="block_order").tolist():
        sequence += range(b * block, min((b + 1) * block, total))
    lane_of = [(epoch * total + p) % order.global_batch * order.lanes // order.global_batch for p in range(total)]
    out, taken = [0] * total, 0
    shuffled = {position: k for k, position in enumerate(permutation(order.seed, epoch, total).tolist())}
    for lane in range(order.lanes):
        places = [p for p in range(total) if lane_of[p] == lane]
        for first in range(0, len(places), WINDOW_BLOCKS * block):
            here = places[first : first + WINDOW_BLOCKS * block]
            positions = sorted(range(taken, taken + len(here)), key=shuffled.__getitem__)
            for place, position in zip(here, positions, strict=True):
                out[place] = sequence[position]
            taken += len(here)
    return out


def test_blocks_against_loops() -> None:
    order = SampleOrder(5, 501, block=6, global_batch=20)
    for epoch in (0, 1, 7):
        assert order.items(epoch * 501 + torch.arange(501)).tolist() == _slow_blockwise(order, epoch)


@pytest.mark.parametrize(("world", "micro"), [(1, 32), (2, 4), (4, 8), (8, 4), (8, 1)])
def test_ranks_read_blocks_of_their_own(world: int, micro: int) -> None:
    """Each epoch, on each layout: a block is read by one rank, but for those that a cut between two ranks divides."""
    total, batch, block = 32 * 50, 32, 8
    order = SampleOrder(1, total, block=block, global_batch=batch)
    assert order.lanes == 32
    steps = total // batch
    for epoch in range(2):
        blocks = []
        for rank in range(world):
            layout = BatchLayout(global_batch=batch, micro_batch=micro, world_size=world, rank=rank)
            wanted = requests(order, layout, start_step=epoch * steps, num_steps=steps, flip=False)
            items = torch.cat([want.items for want in wanted])
            assert len(items) == total // world
            blocks.append(set((items // block).tolist()))
        shared = [b for b in range(total // block) if sum(b in mine for mine in blocks) > 1]
        assert len(shared) <= world - 1
        for mine in blocks:  # and reads no more blocks than its share of the images fills
            assert len(mine) <= total // block // world + 2


def test_global_batches_of_blocks_do_not_depend_on_the_layout_and_resume() -> None:
    def draws(world: int, micro: int, start: int = 0) -> dict[int, int]:
        order = SampleOrder(5, 310, block=7, global_batch=24)
        drawn = {}
        for rank in range(world):
            layout = BatchLayout(global_batch=24, micro_batch=micro, world_size=world, rank=rank)
            for want in requests(order, layout, start_step=start, num_steps=28 - start, flip=False):
                drawn.update(zip(want.index.tolist(), want.items.tolist(), strict=True))
        return drawn

    alone = draws(1, 24)
    for world, micro in [(1, 2), (2, 4), (4, 6), (8, 3), (8, 1)]:
        assert draws(world, micro) == alone
    for start in (1, 13, 27):  # step 12 ends the first epoch
        assert draws(2, 4, start) == {n: item for n, item in alone.items() if n >= start * 24}


def test_blocks_are_mixed_within_a_window_and_windows_with_one_another() -> None:
    """Neighbours in a lane come from one window of blocks, and lanes from all over the data."""
    total, batch, block = 64 * 400, 64, 50
    order = SampleOrder(2, total, block=block, global_batch=batch)
    batches = order.items(torch.arange(total)).view(-1, batch)
    lane = batches[:, 7]  # one slot a lane
    windows = lane.view(-1, WINDOW_BLOCKS * block)
    assert all(len((window // block).unique()) <= WINDOW_BLOCKS + 1 for window in windows)
    inside = windows[0] // block
    assert (inside[1:] != inside[:-1]).float().mean() > 0.5  # 3/4 expected: not block by block
    assert len((batches[0] // block).unique()) > 55  # 64 lanes, each in a window of its own


def test_lanes_divide_the_batch() -> None:
    lanes = {batch: SampleOrder(0, 10, global_batch=batch).lanes for batch in (1, 7, 24, 64, 128, 134, 256, 384)}
    assert lanes == {1: 1, 7: 7, 24: 24, 64: 64, 128: 64, 134: 2, 256: 64, 384: 64}
