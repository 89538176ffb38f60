"""The training order: the same for every world, each position once an epoch; and how batches are dealt."""

import time

import numpy as np
import pytest

from mlpmem_ds.core import hashing
from mlpmem_ds.core.hashing import shuffled
from mlpmem_ds.formats.training_order import TrainingOrder, deal

N, BLOCK = 203, 16


def make_order(window_blocks=3, seed=1, **changes):
    sizes = {"num_positions": N, "block_size": BLOCK, "window_blocks": window_blocks, "seed": seed}
    return TrainingOrder(**(sizes | changes))


@pytest.mark.parametrize("is_computed", [False, True], ids=["kept", "computed"])
@pytest.mark.parametrize("window_blocks", [1, 3, 13, 100])
def test_each_position_once_an_epoch(window_blocks, is_computed, monkeypatch):
    """Also where the order of the blocks is computed, as above 2^20 of them, and not kept."""
    if is_computed:
        monkeypatch.setattr(hashing, "_KEPT_ITEMS", 1)
    order = make_order(window_blocks)
    epochs = [order.positions(epoch * N, (epoch + 1) * N) for epoch in range(3)]
    for positions in epochs:
        assert sorted(positions) == list(range(N))
    assert not np.array_equal(epochs[0], epochs[1])
    pieces = [
        make_order(window_blocks).positions(start, min(start + 7, 3 * N)) for start in range(0, 3 * N, 7)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), np.concatenate(epochs))
    assert not np.array_equal(make_order(window_blocks, seed=2).positions(0, N), epochs[0])


@pytest.mark.parametrize("num_positions", [16, 17, 203, 208])
@pytest.mark.parametrize("by_block", [False, True])
def test_the_order_is_the_permutations_in_plain_words(num_positions, by_block):
    """Blocks permuted, windows of them sorted, the positions of each permuted."""
    order = make_order(3, num_positions=num_positions, by_block=by_block)
    for epoch in range(2):
        blocks = shuffled(-(-num_positions // BLOCK), 1, epoch, 0)
        expected = []
        step = 1 if by_block else 3
        for number, at in enumerate(range(0, len(blocks), step)):
            inside = np.concatenate(
                [
                    np.arange(block * BLOCK, min(block * BLOCK + BLOCK, num_positions))
                    for block in sorted(blocks[at : at + step])
                ]
            )
            expected.append(inside if by_block else inside[shuffled(len(inside), 1, epoch, 1 + number)])
        found = order.positions(epoch * num_positions, (epoch + 1) * num_positions)
        np.testing.assert_array_equal(found, np.concatenate(expected))


def test_a_window_holds_whole_blocks():
    """The first window's positions are those of three blocks: reading stays sequential on disk."""
    order = make_order(3)
    window = next(order.parts(0, 1)).window
    assert {position // BLOCK for position in window.positions_n} == set(window.blocks_L.tolist())
    assert len(window.blocks_L) == 3
    following = order.next_window(window)
    assert following.first_row == len(window.rows_n) and following.key == (0, 1)
    (last,) = order.parts(N - 1, N)
    assert order.next_window(last.window).key == (1, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("window_blocks", [2, 5, 100])
def test_ranks_share_each_batch_in_equal_parts(size, window_blocks):
    order = make_order(window_blocks)
    for batch in range(34):  # two epochs
        expected = order.positions(12 * batch, 12 * batch + 12)
        shares = [order.shares(batch, 12, rank=rank, size=size) for rank in range(size)]
        mine = [np.concatenate([part.positions_m for part in of_rank]) for of_rank in shares]
        assert [len(positions) for positions in mine] == [12 // size] * size
        np.testing.assert_array_equal(np.sort(np.concatenate(mine)), np.sort(expected))
        if len(set(expected.tolist())) == 12:  # not the same position of two epochs
            places = [[expected.tolist().index(position) for position in positions] for positions in mine]
            assert all(of_rank == sorted(of_rank) for of_rank in places)  # in the order of the batch
    one = make_order(window_blocks)
    np.testing.assert_array_equal(
        np.concatenate([part.positions_m for part in one.shares(3, 12, rank=0, size=1)]),
        one.positions(36, 48),
    )


@pytest.mark.parametrize(("size", "batch_positions"), [(8, 1 << 15), (32, 1 << 17), (256, 1 << 20)])
def test_a_rank_touches_its_part_of_the_blocks(size, batch_positions):
    """Rows of the blocks that a rank touches in a window, for each of its rows; windows of 1,024 blocks."""
    order = make_order(1024, num_positions=1 << 23, block_size=1024)
    used, read = 0, 0
    for rank in (0, size // 3, size - 1):
        touched = {}
        for batch in range((1 << 21) // batch_positions):
            for share in order.shares(batch, batch_positions, rank=rank, size=size):
                used += len(share.rows_m)
                blocks = touched.setdefault(share.window.key, set())
                blocks.update(share.window.places_of(share.rows_m).tolist())
        read += 1024 * sum(map(len, touched.values()))
    assert used == 3 * (1 << 21) // size
    assert read / used <= 1.1


def test_a_batch_over_windows_of_other_sizes_is_dealt_by_their_parts():
    """The end of a long window and the whole of a short one: each rank has its part of both."""
    order = make_order(8, num_positions=16 * 10, seed=5)  # windows of 8 and 2 blocks
    parts = list(order.parts(96, 160))
    assert [len(part.window.blocks_L) for part in parts] == [8, 2]
    for rank, places in ((0, {0}), (3, {1})):
        shares = deal(parts, rank=rank, size=4)
        assert set(shares[-1].window.places_of(shares[-1].rows_m).tolist()) <= places
        assert sum(len(share.rows_m) for share in shares) == 16


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_runs_are_the_shares_by_block(size):
    order = make_order(by_block=True)
    for batch in range(20):
        runs = order.runs(batch, 24, size=size)
        for rank in range(size):
            shares = order.shares(batch, 24, rank=rank, size=size)
            found = np.concatenate([np.arange(*run) for run in runs[rank]])
            np.testing.assert_array_equal(found, np.concatenate([share.positions_m for share in shares]))


@pytest.mark.parametrize("num_positions", [5 * 10**9, 2 * 10**11 + 7])
def test_the_order_of_many_positions_costs_no_more(num_positions):
    start = time.process_time()
    order = make_order(1024, num_positions=num_positions, block_size=1024, by_block=True)
    positions = order.positions(num_positions // 2, num_positions // 2 + 100 * 1024)
    order.runs(7, 1 << 18, size=256)
    assert time.process_time() - start < 1
    assert len(np.unique(positions)) == 100 * 1024 and positions.max() < num_positions


def test_the_shuffle_is_fixed_for_ever():
    assert shuffled(8, 1, 2).tolist() == shuffled(8, 1, 2).tolist()
    assert sorted(shuffled(1000, 3)) == list(range(1000))
    counts = np.bincount([shuffled(5, seed)[0] for seed in range(2000)], minlength=5)
    assert counts.min() > 320  # 400 expected
