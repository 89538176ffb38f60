"""Blocks of a search cover everything once and keep to their bounds."""

from __future__ import annotations

import numpy as np
import pytest

from mlpmem_ds.maths.search_blocks import budget_blocks, growing_blocks, order_of_probes, probed_lists


@pytest.mark.parametrize(("num_keys", "key_block"), [(1, 4096), (100_000, 4096), (70_001, 65536), (500, 100)])
def test_growing_blocks_cover_the_keys_once_and_end_at_the_largest_size(
    num_keys: int, key_block: int
) -> None:
    blocks = list(growing_blocks(num_keys, key_block))
    assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
    assert blocks[-1][1] == num_keys
    sizes = [stop - start for start, stop in blocks]
    assert max(sizes) <= key_block
    assert all(after <= 2 * before for before, after in zip(sizes, sizes[1:], strict=False))


def test_budget_blocks_hold_as_many_queries_as_fit_and_at_least_one() -> None:
    costs = np.array([3, 3, 3, 20, 1, 1, 9])
    assert list(budget_blocks(costs, 9)) == [(0, 3), (3, 4), (4, 6), (6, 7)]
    assert list(budget_blocks(costs, 10_000)) == [(0, 7)]
    assert list(budget_blocks(np.array([], np.int64), 9)) == []


def test_queries_are_taken_in_the_order_of_their_first_list() -> None:
    assert order_of_probes(np.array([[3, 1], [0, 2], [3, 0], [1, 1]])).tolist() == [1, 3, 0, 2]
    assert order_of_probes(np.empty((2, 0), np.int64)).tolist() == [0, 1]


def test_probed_lists_lay_out_candidates_by_list_then_by_query() -> None:
    probes = np.array([[2, 0], [2, 1], [0, -1]])
    sizes = np.array([[4, 3], [4, 0], [3, 0]])
    starts = np.zeros_like(probes)
    places, lists = probed_lists(probes, sizes, starts)
    assert lists == [(0, 0, 2, 0), (2, 2, 4, 6)]
    assert probes.ravel()[places].tolist() == [0, 0, 2, 2]
    assert starts.ravel()[places].tolist() == [0, 3, 6, 10]
