import itertools

import numpy as np
import pytest

from mlpmem_ds.core import hashing
from mlpmem_ds.core.hashing import (
    Permutation,
    draw_positions,
    hash_fraction,
    sample_positions,
    shuffled,
)


def test_hash_fraction_is_fixed_and_spread() -> None:
    assert hash_fraction("a") == hash_fraction("a") != hash_fraction("a", seed=1)
    values = [hash_fraction(number) for number in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert 0.45 < sum(values) / len(values) < 0.55


def test_shuffling_is_a_permutation_that_depends_on_every_key() -> None:
    orders = [shuffled(1000, *keys) for keys in ((0, 0), (0, 1), (1, 0), (0, 0, 0))]
    for order in orders:
        assert sorted(order) == list(range(1000))
    assert len({order.tobytes() for order in orders}) == len(orders)
    np.testing.assert_array_equal(shuffled(1000, 0, 1), orders[1])
    assert abs(np.corrcoef(np.arange(1000), orders[0])[0, 1]) < 0.1
    assert len(shuffled(0, 1)) == 0


def test_a_sample_is_about_as_large_as_wanted_and_spread() -> None:
    sample = sample_positions(100_000, 5_000, seed=3)
    assert 4_700 < len(sample) < 5_300
    assert (np.diff(sample) > 0).all() and sample.max() < 100_000
    assert 0.45 < sample.mean() / 100_000 < 0.55
    assert len(np.intersect1d(sample, sample_positions(100_000, 5_000, seed=4))) < 600
    np.testing.assert_array_equal(sample_positions(10, 10, seed=0), np.arange(10))


def test_a_few_of_very_many_positions_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank of an audit draws its sample; and up to some number it is the one of every earlier run."""
    np.testing.assert_array_equal(
        draw_positions(100_000, 5_000, seed=3), sample_positions(100_000, 5_000, seed=3)
    )
    monkeypatch.setattr(hashing, "sample_positions", None)  # it looks at each position
    drawn = draw_positions(2 * 10**11, 1000, seed=2)
    assert drawn.dtype == np.int64 and len(np.unique(drawn)) == 1000 and (np.diff(drawn) > 0).all()
    assert drawn[0] >= 0 and drawn[-1] < 2 * 10**11 and abs(drawn.mean() / 1e11 - 1) < 0.06
    assert len(np.intersect1d(drawn, draw_positions(2 * 10**11, 1000, seed=3))) < 5


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65, 1000, 5000])
def test_a_permutation_that_is_computed_has_each_item_once(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Permutation(count, 7, 1)
    np.testing.assert_array_equal(kept.items(0, count), shuffled(count, 7, 1))
    monkeypatch.setattr(hashing, "_KEPT_ITEMS", 0)
    computed = Permutation(count, 7, 1)
    items = computed.items(0, count)
    np.testing.assert_array_equal(np.sort(items), np.arange(count))
    pieces = [computed.items(at, min(at + 7, count)) for at in range(0, count, 7)]
    np.testing.assert_array_equal(np.concatenate(pieces), items)
    for permutation in (kept, computed):
        at = permutation.items(0, count)
        assert [permutation.place_of(int(at[place])) for place in range(0, count, 13)] == [
            *range(0, count, 13)
        ]
    if count > 60:
        assert abs(np.corrcoef(np.arange(count), items)[0, 1]) < 0.3
        assert abs(np.corrcoef(items[:-1], items[1:])[0, 1]) < 0.3
        others = [Permutation(count, *keys).items(0, count) for keys in ((7, 2), (8, 1))]
        assert all(not np.array_equal(a, b) for a, b in itertools.combinations([items, *others], 2))


def test_a_permutation_of_many_items_costs_no_memory() -> None:
    """Places of two thousand million items, at the ends and in the middle."""
    count = 2 * 10**9
    permutation = Permutation(count, 0)
    items = np.concatenate([permutation.items(at, at + 10_000) for at in (0, count // 2, count - 10_000)])
    assert len(np.unique(items)) == len(items) and 0 <= items.min() <= items.max() < count
    counts = np.bincount(items * 20 // count, minlength=20)
    assert counts.min() > 1300 and counts.max() < 1700  # 1,500 expected
    assert permutation.place_of(int(items[0])) == 0
    assert permutation.place_of(int(items[-1])) == count - 1
