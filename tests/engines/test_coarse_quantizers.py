"""The lists near a vector against brute force, by each coarse quantizer."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from mlpmem_ds.engines import faiss_library
from mlpmem_ds.engines.collectives.alone import Alone
from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.maths.kmeans import Share, integer_centroids

from .test_faiss import DIM, blob_of, centroids_of, codes, exact_squared, trained


def test_a_graph_of_centroids_leads_to_near_lists() -> None:
    """Against brute force; the same file from any number of threads."""
    vectors, queries = codes(6000, seed=2, spread=30), codes(500, seed=3, spread=30)
    before = faiss.omp_get_max_threads()
    blobs = []
    for threads in (1, 2):
        faiss_library.set_num_threads(threads)
        index = trained("IVF512_HNSW8,PQ3x4", vectors)
        blobs.append(blob_of(index))
    faiss_library.set_num_threads(before)
    assert blobs[0] == blobs[1] and index.num_lists == 512
    centroids = centroids_of(index)
    assert np.array_equal(
        centroids, integer_centroids(Share.whole(vectors), 512, seed=1, ranks=Alone()).astype(np.float32)
    )
    distances = exact_squared(queries, centroids)
    assigned = index.assign(queries, 20)
    assert (distances[np.arange(500), assigned[:, 0]] == distances.min(1)).mean() > 0.99
    true_sets = np.argsort(distances, axis=1, kind="stable")[:, :20]
    recall = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(assigned, true_sets, strict=True)])
    assert recall > 0.98
    assert (np.diff(np.take_along_axis(distances, assigned, axis=1), axis=1) >= 0).all()
    pieces = [index.assign(queries[start : start + 13], 20) for start in range(0, 500, 13)]
    assert np.array_equal(np.concatenate(pieces), assigned)


def test_a_graph_that_does_not_reach_enough_lists_is_not_asked_alone() -> None:
    """Every list is found where all are asked for, though parts of a graph may not be connected."""
    index = trained("IVF300_HNSW2,Flat", codes(6000, seed=2, spread=30))
    found = index.assign(codes(40, seed=4), 1000)
    assert np.array_equal(np.sort(found, axis=1), np.broadcast_to(np.arange(300), (40, 300)))


def test_lists_that_have_another_quantizer_are_refused() -> None:
    with pytest.raises(ValueError, match="choose IVF1024 .* or IVF1024_HNSW32"):
        Index.make("IVF16(IVF4,Flat),Flat", DIM)
