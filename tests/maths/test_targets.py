"""kNN targets against plain loops in float64."""

import numpy as np
import pytest

from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.maths.targets import aggregate, knn_probability, truncate
from mlpmem_ds.maths.weighting import Weighting


def make_rows(num_rows=29, k=17, vocabulary=7, seed=0):
    rng = np.random.default_rng(seed)
    distances = np.sort(rng.integers(1000, 1200, (num_rows, k)), axis=1).astype(np.float64)
    counts = rng.integers(0, k + 1, num_rows)
    counts[:3] = [0, 1, k]
    valid = np.arange(k)[None] < counts[:, None]
    return (
        np.where(valid, distances, np.finfo(np.float64).max),
        np.where(valid, rng.integers(0, vocabulary, (num_rows, k)), -1),
        valid,
    )


def as_dicts(rows: SparseRows):
    bounds = zip(rows.offsets[:-1], rows.offsets[1:], strict=True)
    return [
        dict(zip(rows.ids[a:b].tolist(), rows.probabilities[a:b].tolist(), strict=True)) for a, b in bounds
    ]


def plain_target(distances, values, valid, temperature):
    target: dict[int, float] = {}
    terms = [
        (int(v), np.exp(-(d - distances[0]) / temperature))
        for d, v, ok in zip(distances, values, valid, strict=True)
        if ok
    ]
    total = sum(weight for _, weight in terms)
    for value, weight in terms:
        target[value] = target.get(value, 0.0) + weight / total
    return target


def test_weights_and_aggregate_equal_the_plain_formula():
    distances, values, valid = make_rows()
    weights = Weighting(temperature=25.0).weights(distances, valid)
    np.testing.assert_allclose(weights.sum(1), valid.any(1), rtol=1e-14)
    assert (weights[0] == 0).all() and (weights[~valid] == 0).all()
    rows = aggregate(weights, values)
    assert rows.offsets.dtype == rows.ids.dtype == np.int64 and rows.probabilities.dtype == np.float64
    for row, found in enumerate(as_dicts(rows)):
        expected = plain_target(distances[row], values[row], valid[row], 25.0)
        assert list(found) == sorted(expected)
        assert found == pytest.approx(expected, rel=1e-13)


def test_a_row_does_not_depend_on_its_batch_nor_on_missing_neighbours_behind_it():
    distances, values, valid = make_rows(num_rows=41, k=133, vocabulary=5)
    whole = aggregate(Weighting(temperature=30.0).weights(distances, valid), values)
    for row in range(41):
        here = slice(row, row + 1)
        used = max(1, int(valid[row].sum()))
        for columns in (slice(None), slice(0, used)):
            part = (array[here, columns] for array in (distances, valid, values))
            part_distances, part_valid, part_values = part
            alone = aggregate(Weighting(temperature=30.0).weights(part_distances, part_valid), part_values)
            inside = slice(whole.offsets[row], whole.offsets[row + 1])
            np.testing.assert_array_equal(alone.ids, whole.ids[inside])
            np.testing.assert_array_equal(alone.probabilities, whole.probabilities[inside])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_aggregate_of_nothing(shape):
    rows = aggregate(np.zeros(shape), np.zeros(shape, int))
    np.testing.assert_array_equal(rows.offsets, np.zeros(shape[0] + 1))
    kept = truncate(rows, 0.9, np.zeros(shape[0], int))
    np.testing.assert_array_equal(kept.offsets, rows.offsets)
    np.testing.assert_array_equal(kept.dropped, np.zeros(shape[0]))
    np.testing.assert_array_equal(
        knn_probability(np.zeros(shape), np.zeros(shape, int), np.zeros(shape[0])), np.zeros(shape[0])
    )


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("with_gold", [False, True])
def test_truncate_keeps_the_fewest_most_probable_ids(mass, with_gold):
    distances, values, valid = make_rows(num_rows=60, k=40, vocabulary=12)
    rows = aggregate(Weighting(temperature=40.0).weights(distances, valid), values)
    gold = np.random.default_rng(3).integers(0, 14, 60)  # some ids no row has
    kept = truncate(rows, mass, gold if with_gold else None)
    for row, (before, after) in enumerate(zip(as_dicts(rows), as_dicts(kept), strict=True)):
        total, reached, expected = sum(before.values()), 0.0, set()
        for token, probability in sorted(before.items(), key=lambda item: (-item[1], item[0])):
            if reached < mass * total - 1e-12:
                expected.add(token)
                reached += probability
        if with_gold and gold[row] in before:
            expected.add(int(gold[row]))
        assert set(after) == expected and list(after) == sorted(after)
        assert all(after[token] == before[token] for token in after)
        assert kept.dropped[row] == pytest.approx(total - sum(after.values()), abs=1e-12)
    if mass == 1.0:
        assert (kept.dropped == 0).all()


def test_truncate_breaks_ties_by_id():
    rows = SparseRows.from_counts(
        np.array([4, 2]), np.array([2, 3, 5, 9, 1, 4]), np.array([0.25] * 4 + [0.5] * 2)
    )
    kept = truncate(rows, 0.5)
    np.testing.assert_array_equal(kept.ids, [2, 3, 1])
    np.testing.assert_array_equal(kept.offsets, [0, 2, 3])
    np.testing.assert_array_equal(kept.dropped, [0.5, 0.5])
    kept = truncate(rows, 0.5, np.array([9, 7]))
    np.testing.assert_array_equal(kept.ids, [2, 3, 9, 1])
    np.testing.assert_array_equal(kept.dropped, [0.25, 0.5])


def test_truncate_refuses_a_mass_that_is_not_a_share():
    rows = SparseRows.empty(0)
    for mass in (0, 1.01, float("nan")):
        with pytest.raises(ValueError, match="mass is"):
            truncate(rows, mass)


def test_label_probability_equals_the_target_entry():
    distances, values, valid = make_rows()
    weights = Weighting(temperature=25.0).weights(distances, valid)
    labels = np.random.default_rng(4).integers(0, 9, len(weights))
    expected = [
        row.get(int(label), 0.0)
        for row, label in zip(as_dicts(aggregate(weights, values)), labels, strict=True)
    ]
    assert 0 < np.count_nonzero(expected) < len(expected)
    np.testing.assert_allclose(knn_probability(weights, values, labels), expected, rtol=1e-14)
