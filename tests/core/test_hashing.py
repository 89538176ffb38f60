import numpy as np

from mlpmem_ds.core.hashing import hash_fraction, sample_positions, shuffled


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
