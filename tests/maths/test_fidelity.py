"""Neighbours gathered chunk by chunk, recall and total variation, against plain loops."""

import numpy as np
import pytest

from mlpmem_ds.maths.fidelity import merge_neighbours, recall, total_variation
from mlpmem_ds.maths.knn import Exclusion, Neighbours, exact_neighbours


@pytest.mark.parametrize("k", [3, 40, 90])
def test_chunks_merged_are_the_search_over_all(k):
    generator = np.random.default_rng(0)
    keys = generator.integers(-3, 4, (80, 3)).astype(np.int8)  # many ties
    rows = np.array([0, 5, 31, 79])
    whole = exact_neighbours(keys[rows], keys, k, exclusion=Exclusion(query_ids_Q=rows))
    merged = None
    for first in range(0, 80, 17):
        part = exact_neighbours(keys[rows], keys[first : first + 17], k, exclusion=Exclusion(query_ids_Q=rows - first))
        ids = np.where(part.ids_QK >= 0, part.ids_QK + first, -1)
        part = Neighbours(ids_QK=ids, distances_QK=part.distances_QK)
        merged = part if merged is None else merge_neighbours(merged, part, k)
    np.testing.assert_array_equal(merged.ids_QK, whole.ids_QK)
    np.testing.assert_array_equal(merged.distances_QK, whole.distances_QK)


def test_recall_counts_each_row_alone():
    wanted = np.array([[4, 2, 9], [1, 3, -1], [-1, -1, -1]])
    found = np.array([[2, 8, 4], [9, 2, 3], [1, 2, 3]])
    assert recall(found, wanted) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert recall(wanted[:2], wanted[:2]) == 1.0
    with pytest.raises(ValueError, match="no recall"):
        recall(found[2:], wanted[2:])


def test_total_variation_equals_a_loop_over_values():
    generator = np.random.default_rng(1)
    weights, other = generator.random((2, 6, 12))
    weights[0, 3:] = other[1, 5:] = 0
    weights /= weights.sum(1, keepdims=True)
    other /= other.sum(1, keepdims=True)
    values, other_values = generator.integers(0, 7, (2, 6, 12))
    expected = [
        sum(abs(weights[row][values[row] == v].sum() - other[row][other_values[row] == v].sum()) for v in range(7)) / 2
        for row in range(6)
    ]
    np.testing.assert_allclose(total_variation(weights, values, other, other_values), expected, atol=1e-12)
    np.testing.assert_allclose(total_variation(weights, values, weights, values), 0, atol=1e-12)
    np.testing.assert_allclose(total_variation(weights, values, weights, values + 7), 1)
