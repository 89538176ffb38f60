"""Neighbours gathered chunk by chunk are those of one search."""

import numpy as np
import pytest

from mlpmem_ds.maths.knn import Exclusion, Neighbours, exact_neighbours
from mlpmem_ds.maths.neighbours import merge_neighbours


@pytest.mark.parametrize("k", [3, 40, 90])
def test_chunks_merged_are_the_search_over_all(k):
    generator = np.random.default_rng(0)
    keys = generator.integers(-3, 4, (80, 3)).astype(np.int8)  # many ties
    rows = np.array([0, 5, 31, 79])
    whole = exact_neighbours(keys[rows], keys, k, exclusion=Exclusion(query_ids_Q=rows))
    merged = None
    for first in range(0, 80, 17):
        part = exact_neighbours(
            keys[rows], keys[first : first + 17], k, exclusion=Exclusion(query_ids_Q=rows - first)
        )
        ids = np.where(part.ids_QK >= 0, part.ids_QK + first, -1)
        part = Neighbours(ids_QK=ids, distances_QK=part.distances_QK)
        merged = part if merged is None else merge_neighbours(merged, part, k)
    np.testing.assert_array_equal(merged.ids_QK, whole.ids_QK)
    np.testing.assert_array_equal(merged.distances_QK, whole.distances_QK)
