"""Shards dealt to ranks: each of the sequence once, also when a training goes on with other ranks."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator

import pytest

from mlpmem_ds.formats.shard_deal import (
    Left,
    Report,
    ShardDeal,
    ShardSequence,
    blocks_to_read,
    groups_of_block,
    mask_of,
    num_groups,
    rows_left,
)


def test_an_epoch_has_each_shard_once() -> None:
    sequence = ShardSequence(num_shards=7, seed=3)
    epochs = [[sequence.at(7 * epoch + place) for place in range(7)] for epoch in range(3)]
    for epoch, found in enumerate(epochs):
        assert sorted(found) == [(epoch, shard) for shard in range(7)]
    assert len({tuple(shard for _, shard in found) for found in epochs}) == 3


def test_groups_are_counted_through_blocks() -> None:
    assert [groups_of_block(rows) for rows in (0, 1, 64, 65, 1024)] == [0, 1, 1, 2, 16]
    assert num_groups(2 * 100 + 3, 100) == 2 + 2 + 1
    assert mask_of([0, 3]) == 0b1001


@pytest.mark.parametrize("seed", range(20))
def test_ranks_that_stop_and_go_on_read_each_number_once(seed: int) -> None:
    """Random progress, and a random number of ranks after each stop."""
    chance = random.Random(seed)
    deal, read = ShardDeal(), []
    for _ in range(6):
        size = chance.randint(1, 5)
        reports = []
        for rank in range(size):
            begun = [rank + size * index for index in range(chance.randint(0, 6))]
            still_open = {place: deal.at(place).mask | 1 for place in begun if chance.random() < 0.4}
            read += [deal.at(place).number for place in begun if place not in still_open]
            reports.append(Report(next_place=rank + size * len(begun), open=still_open))
        deal = deal.after(reports)
        assert ShardDeal.from_json(json.loads(json.dumps(deal.to_json()))) == deal
        left = [shard.number for shard in deal.left]
        assert left == sorted(set(left)) and all(number < deal.horizon for number in left)
        assert not set(left) & set(read)
    assert len(set(read)) == len(read)
    assert sorted([*read, *(shard.number for shard in deal.left)]) == list(range(deal.horizon))


def test_what_was_begun_comes_first_and_keeps_its_mask() -> None:
    deal = ShardDeal().after([Report(next_place=6, open={2: 0b101}), Report(next_place=3, open={1: 0})])
    assert deal == ShardDeal(horizon=5, left=(Left(number=1), Left(number=2, mask=0b101), Left(number=3)))
    found = [deal.at(place).number for place in range(6)]
    assert found == [1, 2, 3, 5, 6, 7]
    again = deal.after([Report(next_place=2, open={}), Report(next_place=1, open={})])
    assert again.left == deal.left[1:] and again.horizon == 5


def test_a_thousand_ranks_leave_little_to_remember() -> None:
    size = 1000
    reports = [Report(next_place=rank + 1500 * size, open={rank + 1499 * size: 1}) for rank in range(size)]
    deal = ShardDeal().after(reports)
    assert deal.horizon == 1_500_000 and len(deal.left) == size
    assert [shard.mask for shard in itertools.islice(deal.left, 2)] == [1, 1]


def test_rows_left_of_a_shard_are_those_of_its_groups() -> None:
    """Blocks of 150 rows: groups of 64, 64 and 22."""
    assert rows_left(350, 150, 0) == [150, 150, 50]
    assert rows_left(350, 150, 0b000_010) == [86, 150, 50]
    assert rows_left(350, 150, 0b1_100_111) == [128]


def test_readers_begin_no_shard_while_the_open_ones_hold_rows_enough() -> None:
    def shards() -> list[Iterator[list[int]]]:
        return [itertools.repeat([10, 10]), itertools.repeat([10, 10, 10])]

    assert blocks_to_read(shards(), 10) == blocks_to_read(shards(), 1) == [1, 0]
    assert blocks_to_read(shards(), 21) == [2, 1]
    assert blocks_to_read(shards(), 50) == [2, 3]
    assert blocks_to_read(shards(), 51) == [3, 3]
