"""The retriever's own arithmetic; its arms are tested as parts of the evaluation
(tests/stages/evaluation)."""

import numpy as np
import pytest

from mlpmem_ds.stages.retrieval.retriever import rescore, squared_norms


@pytest.mark.parametrize("dtype", [np.int8, np.float16])
def test_rescored_distances(dtype):
    generator = np.random.default_rng(0)
    stored = generator.integers(-127, 128, (50, 7)).astype(dtype)
    queries = generator.integers(-127, 128, (9, 7)).astype(dtype)
    ids = generator.integers(0, 50, (9, 5))
    ids[[0, 4, 8], -1] = -1
    found = rescore(queries, ids, stored, squared_norms(stored))
    wanted = ((stored[ids].astype(np.float64) - queries[:, None].astype(np.float64)) ** 2).sum(-1)
    np.testing.assert_array_equal(found[ids >= 0], wanted[ids >= 0])
    assert (found[ids == -1] > 1e18).all()
    assert found.dtype == (np.int64 if dtype == np.int8 else np.float64)
