"""Code words trained by threads as ranks: the bytes of the index that faiss trains alone."""

from __future__ import annotations

import threading
from typing import Any

import faiss
import numpy as np
import pytest

from mlpmem_ds.engines import code_words
from mlpmem_ds.engines.code_words import are_trained_together
from mlpmem_ds.engines.collectives.alone import Alone
from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.maths.kmeans import Share


class Threads(Alone):
    """A rank among threads."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: dict[int, Any]) -> None:
        super().__init__()
        self.rank, self.size, self._barrier, self._table = rank, size, barrier, table

    def gather(self, value: Any) -> list[Any]:
        self._table[self.rank] = value
        self._barrier.wait()
        values = [self._table[rank] for rank in range(self.size)]
        self._barrier.wait()
        return values

    def sum(self, array: np.ndarray) -> np.ndarray:
        return np.sum(self.gather(array), axis=0, dtype=array.dtype)

    def exchange(self, parts: Any) -> list[np.ndarray]:
        return [sent[self.rank] for sent in self.gather(list(parts))]


def vectors(count: int, dim: int) -> np.ndarray:
    return np.random.default_rng(count).integers(-60, 60, (count, dim)).astype(np.int8)


def trained_by(size: int, factory: str, vectors_ND: np.ndarray) -> bytes:
    """The index of rank 0, of which each rank had every size-th vector."""
    barrier, table, made = threading.Barrier(size, timeout=60), dict[int, Any](), dict[int, bytes]()

    def run(rank: int) -> None:
        try:
            index = Index.make(factory, vectors_ND.shape[1])
            numbers = np.arange(rank, len(vectors_ND), size)
            share = Share(vectors_nD=vectors_ND[numbers], numbers_n=numbers, total=len(vectors_ND))
            index.train(share, ranks=Threads(rank, size, barrier, table), seed=1)
            made[rank] = faiss.serialize_index(index.raw).tobytes()
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made[0]


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
