"""Neighbours gathered chunk by chunk are those of one search."""

import numpy as np
import pytest

from mlpmem_ds.maths.knn import Exclusion, pack_exact_neighbours
from mlpmem_ds.maths.neighbours import merge_neighbours


@pytest.mark.parametrize("k", [3, 40, 90])
def test_chunks_merged_are_the_search_over_all(k):
    generator = np.random.default_rng(0)
    keys = generator.integers(-3, 4, (80, 3)).astype(np.int8)  # many ties
    rows = np.array([0, 5, 31, 79])
    whole = pack_exact_neighbours(keys[rows], keys, k, exclusion=Exclusion(query_ids_Q=rows))
    parts = []
    for first in range(0, 80, 17):
        part = keys[first : first + 17]
        exclusion = Exclusion(query_ids_Q=rows - first)
        parts.append(pack_exact_neighbours(keys[rows], part, k, exclusion=exclusion).shifted(first))
    for given in (parts, [merge_neighbours(parts[:2]), *parts[2:]], parts[::-1]):
        merged = merge_neighbours(given)
        np.testing.assert_array_equal(merged.packed_QK, whole.packed_QK)
        assert (merged.id_bits, merged.is_integer) == (whole.id_bits, whole.is_integer)


def test_neighbours_of_other_kinds_are_not_merged():
    keys = np.zeros((4, 3), np.int8)
    part = pack_exact_neighbours(keys, keys, 2, exclusion=None)
    with pytest.raises(ValueError, match="another type"):
        merge_neighbours(
            [part, pack_exact_neighbours(keys.astype(float), keys.astype(float), 2, exclusion=None)]
        )
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(4, 3\)"):
        merge_neighbours([part, pack_exact_neighbours(keys, keys, 3, exclusion=None)])
