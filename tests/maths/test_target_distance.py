"""RowComparison of targets against plain loops."""

import numpy as np
import pytest

from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.maths.target_distance import (
    compare_rows,
    count_faulty_rows,
    neighbour_variation,
    probability_of,
    recall,
)

VOCAB_SIZE = 12


def sparse(rows, dropped=None):
    return SparseRows.from_counts(
        np.array([len(row) for row in rows]),
        np.array([token for row in rows for token in row], np.int64),
        np.array([p for row in rows for p in row.values()], np.float64),
        dropped,
    )


def make_rows(seed, num_rows=40):
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(num_rows):
        ids = np.sort(
            generator.choice(VOCAB_SIZE, 0 if number % 7 == seed else generator.integers(1, 9), replace=False)
        )
        weights = generator.dirichlet(np.ones(len(ids))) if len(ids) else []
        rows.append(dict(zip(ids.tolist(), np.asarray(weights).tolist(), strict=True)))
    return rows


def test_distances_equal_plain_loops():
    truth, found = make_rows(0), make_rows(1)
    scale = np.linspace(0.9, 1, len(found))  # not normalized: truncation took the rest
    dropped = np.where([bool(row) for row in found], 1 - scale, 0.0)
    cut = [{token: p * s for token, p in row.items()} for row, s in zip(found, scale, strict=True)]
    result = compare_rows(sparse(truth), sparse(cut, dropped), VOCAB_SIZE)
    for number, (p, q) in enumerate(zip(truth, found, strict=True)):
        tokens = set(p) | set(q)
        expected = sum(abs(p.get(t, 0) - q.get(t, 0)) for t in tokens) / 2
        expected = 1.0 if bool(p) != bool(q) else expected
        assert result.total_variation_Q[number] == pytest.approx(expected, abs=1e-12)
        smoothing = max(dropped[number], 1e-6)
        divergence = sum(
            p[t] * np.log(p[t] / ((1 - smoothing) * q.get(t, 0) + smoothing / VOCAB_SIZE))
            for t in p
            if p[t] > 0
        )
        assert result.divergence_Q[number] == pytest.approx(divergence, abs=1e-12)
    assert 0 < result.total_variation_Q.max() <= 1 and (result.total_variation_Q == 1).any()


def test_recall_counts_what_is_there():
    truth = np.array([[1, 2, 3, 4], [5, 6, -1, -1], [-1, -1, -1, -1], [9, 8, 7, 6]])
    found = np.array([[4, 3, 9, 1], [6, -1, -1, -1], [1, 2, 3, 4], [9, 8, 7, 6]])
    np.testing.assert_allclose(recall(found, truth, 4), [3 / 4, 1 / 2, 1, 1])
    np.testing.assert_allclose(recall(found, truth, 1), [0, 0, 1, 1])
    np.testing.assert_allclose(recall(found, truth, 2), [0, 1 / 2, 1, 1])


def test_probability_of_the_asked_id():
    rows = sparse([{1: 0.25, 4: 0.75}, {}, {2: 1.0}])
    np.testing.assert_array_equal(probability_of(rows, np.array([4, 4, 3])), [0.75, 0, 0])


def test_each_fault_is_counted_once_a_row():
    good = sparse([{1: 0.5, 4: 0.5}, {}, {2: 0.9}], np.array([0, 0, 0.1]))
    none = {"unsorted": 0, "outside": 0, "not_finite": 0, "wrong_sum": 0}
    assert count_faulty_rows(good, VOCAB_SIZE) == none

    def faults(ids=good.ids, probabilities=good.probabilities, dropped=good.dropped):
        rows = SparseRows.from_counts(good.counts_n, np.array(ids), np.array(probabilities), dropped)
        return count_faulty_rows(rows, VOCAB_SIZE)

    assert faults(ids=[4, 1, 2]) == {**none, "unsorted": 1}
    assert faults(ids=[4, 4, 2]) == {**none, "unsorted": 1}
    assert faults(ids=[-1, 4, 12]) == {**none, "outside": 2}
    assert faults(probabilities=[np.nan, 0.5, np.inf]) == {**none, "not_finite": 2, "wrong_sum": 2}
    assert faults(probabilities=[1.0, 0.0, 0.9]) == {**none, "not_finite": 1}
    assert faults(dropped=np.array([0.002, 0, 0.1005])) == {**none, "wrong_sum": 1}


def test_total_variation_equals_a_loop_over_values():
    generator = np.random.default_rng(1)
    weights, other = generator.random((2, 6, 12))
    weights[0, 3:] = other[1, 5:] = 0
    weights /= weights.sum(1, keepdims=True)
    other /= other.sum(1, keepdims=True)
    values, other_values = generator.integers(0, 7, (2, 6, 12))
    expected = [
        sum(
            abs(weights[row][values[row] == v].sum() - other[row][other_values[row] == v].sum())
            for v in range(7)
        )
        / 2
        for row in range(6)
    ]
    np.testing.assert_allclose(
        neighbour_variation(weights, values, other, other_values), expected, atol=1e-12
    )
    np.testing.assert_allclose(neighbour_variation(weights, values, weights, values), 0, atol=1e-12)
    np.testing.assert_allclose(neighbour_variation(weights, values, weights, values + 7), 1)
