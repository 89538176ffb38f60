"""Code words trained by threads as ranks: the bytes of the index that faiss trains alone."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import pytest

from mlpmem_ds.engines import code_words
from mlpmem_ds.engines.code_words import are_trained_together
from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.maths.kmeans import Share

from ..thread_ranks import on_thread_ranks


def vectors(count: int, dim: int) -> np.ndarray:
    return np.random.default_rng(count).integers(-60, 60, (count, dim)).astype(np.int8)


def trained_by(size: int, factory: str, vectors_ND: np.ndarray) -> bytes:
    """The index of rank 0, of which each rank had every size-th vector."""

    def train(ranks: Any) -> bytes:
        index = Index.make(factory, vectors_ND.shape[1])
        numbers = np.arange(ranks.rank, len(vectors_ND), size)
        share = Share(vectors_nD=vectors_ND[numbers], numbers_n=numbers, total=len(vectors_ND))
        index.train(share, ranks=ranks, seed=1)
        return faiss.serialize_index(index.raw).tobytes()

    first: bytes = on_thread_ranks(size, train)[0]
    return first


@pytest.mark.parametrize(
    ("factory", "count", "dim"),
    [
        ("IVF8,PQ3", 700, 12),  # fewer than faiss draws for the code
        ("IVF8,PQ3", 17_000, 6),  # more
        ("IVF8_HNSW8,PQ2", 17_000, 4),
        ("IVF8,PQ3x4", 700, 12),  # by rank 0
    ],
)
def test_ranks_give_the_bytes_of_faiss(
    factory: str, count: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = list[int]()
    train = code_words._code_words
    monkeypatch.setattr(
        code_words, "_code_words", lambda code, own: columns.append(own.shape[1]) or train(code, own)
    )
    alone = trained_by(1, factory, vectors(count, dim))
    assert not columns, "one rank leaves all to faiss"
    for size in (2, 3, 4):  # the last has more ranks than one factory has parts
        columns.clear()
        assert trained_by(size, factory, vectors(count, dim)) == alone
        assert not columns if factory.endswith("x4") else (len(columns), sum(columns)) == (size, dim)


@pytest.mark.parametrize("factory", ["IVF8,PQ3x4", "IVF8,PQ3x4fs", "IVF8,PQ3+4", "IVF8,SQ8", "IVF8,Flat"])
def test_other_codes_stay_with_one_rank(factory: str) -> None:
    assert not are_trained_together(faiss.index_factory(12, factory))
    assert are_trained_together(faiss.index_factory(12, "IVF8,PQ3"))
