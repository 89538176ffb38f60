"""The engine against brute force over integers, and stock faiss on its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.engines import faiss as engine
from mlpmem_ds.engines.collectives.alone import Alone
from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.maths.kmeans import Share, integer_centroids

NUM_VECTORS, DIM = 700, 12


def codes(num_vectors: int = NUM_VECTORS, dim: int = DIM, seed: int = 0, spread: int = 6) -> np.ndarray:
    """Few distinct numbers, so that distances tie often."""
    generator = np.random.default_rng(seed)
    centres = generator.integers(-60, 60, size=(9, dim))
    noise = generator.integers(-spread, spread, (num_vectors, dim))
    return (centres[generator.integers(0, 9, num_vectors)] + noise).astype(np.int8)


def exact_squared(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return ((queries[:, None].astype(np.int64) - keys[None].astype(np.int64)) ** 2).sum(-1)


def centroids_of(index: Index) -> np.ndarray:
    ivf = faiss.extract_index_ivf(index.raw)
    return faiss.downcast_index(ivf.quantizer).reconstruct_n(0, ivf.nlist)


def trained(factory: str, vectors: np.ndarray | None = None, **options: Any) -> Index:
    vectors = codes() if vectors is None else vectors
    index = Index.make(factory, vectors.shape[1])
    index.train(vectors, **{"seed": 1, **options})
    return index


def filled(factory: str, first_id: int = 0) -> Index:
    index = trained(factory)
    index.fill(codes(), np.arange(NUM_VECTORS) + first_id)
    return index


def blob_of(index: Index) -> bytes:
    content: bytes = faiss.serialize_index(index.raw).tobytes()
    return content


def copies(index: Index, count: int) -> list[Index]:
    blob = faiss.serialize_index(index.raw)
    return [Index(faiss.deserialize_index(blob)) for _ in range(count)]


@pytest.fixture
def shards() -> list[Index]:
    """Three shards of one trained index; the last is empty."""
    parts = copies(trained("IVF8,PQ3x4"), 3)
    for start in range(0, NUM_VECTORS, 100):
        part = parts[start // 100 % 2]
        part.fill(codes()[start : start + 100], np.arange(start, min(start + 100, NUM_VECTORS)))
    return parts


def test_integer_centroids_survive_more_lists_than_distinct_codes() -> None:
    few = np.repeat(codes(3), 20, axis=0)
    centroids = integer_centroids(Share.whole(few), 6, seed=0, ranks=Alone())
    assert exact_squared(few, centroids).min(1).max() == 0


def test_assignment_is_exact_and_independent_of_the_batch(shards: list[Index]) -> None:
    queries = codes(seed=5)
    centroids = centroids_of(shards[0])
    assert np.array_equal(centroids, np.rint(centroids))
    distances = exact_squared(queries, centroids)
    expected = np.lexsort((np.broadcast_to(np.arange(8), distances.shape), distances), axis=1)
    for nprobe in (1, 3, 8, 20):
        assert np.array_equal(shards[0].assign(queries, nprobe), expected[:, :nprobe])
    pieces = [shards[0].assign(queries[start : start + 13], 3) for start in range(0, NUM_VECTORS, 13)]
    assert np.array_equal(np.concatenate(pieces), expected[:, :3])


def test_joined_shards_hold_the_lists_of_all(shards: list[Index]) -> None:
    empty_offsets, empty_ids = shards[2].lists()
    assert empty_offsets.tolist() == [0] * 9 and empty_ids.dtype == np.int64 and not len(empty_ids)
    offsets, ids = Index.join(shards).lists()
    assert offsets.tolist()[0] == 0 and offsets[-1] == NUM_VECTORS and sorted(ids) == list(range(NUM_VECTORS))
    nearest = shards[0].assign(codes(), 1)[:, 0]
    for number in range(8):
        assert np.array_equal(ids[offsets[number] : offsets[number + 1]], np.flatnonzero(nearest == number))


@pytest.mark.parametrize("factory", ["IVF8,PQ3x4", "OPQ3,IVF8,PQ3x4", "IVF8,PQ6x4fsr", "IVF8,Flat"])
def test_shards_that_were_read_search_by_one_table(factory: str, tmp_path: Path) -> None:
    """faiss alone makes a table for each file that it reads."""
    parts = copies(trained(factory), 3)
    for number, part in enumerate(parts):
        part.fill(codes()[number::3], np.arange(number, NUM_VECTORS, 3))
        part.write(tmp_path / str(number))
    queries = codes(40, seed=9)
    stock = [faiss.read_index(str(tmp_path / str(number))) for number in range(3)]
    expected = Index.join(map(Index, stock)).search(queries, 20, 3)
    shards = [Index.read(tmp_path / str(number)) for number in range(3)]
    if not factory.endswith("fsr"):  # of which faiss makes one whether or not it is asked to
        assert [table_bytes_in(shard) for shard in shards] == [0, 0, 0]
    joined = Index.join(iter(shards))
    joined.prepare_search()
    assert table_bytes_in(joined) == joined.table_bytes == Index.make(factory, DIM).table_bytes
    assert (joined.table_bytes > 0) == ("PQ" in factory)
    for found, wanted in zip(joined.search(queries, 20, 3), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def table_bytes_in(index: Index) -> int:
    table = getattr(faiss.downcast_index(faiss.extract_index_ivf(index.raw)), "precomputed_table", None)
    return 0 if table is None else 4 * table.size()


def test_no_table_is_counted_where_faiss_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    index = filled("IVF8,PQ3x4")
    assert index.table_bytes == 8 * 3 * 16 * 4
    monkeypatch.setattr(faiss.cvar, "precomputed_table_max_bytes", 1000)
    index.prepare_search()
    assert table_bytes_in(index) == index.table_bytes == 0


@pytest.mark.parametrize("factory", ["IVF32,Flat", "PCA8,IVF32,PQ4x4", "OPQ3,IVF32,PQ3x4", "IVF32,SQ8"])
def test_two_levels_of_lists(factory: str) -> None:
    """Trained in two levels every index finds a code by probing its nearest lists, whatever stands before
    them."""
    indexes = [trained(factory, two_level_above=above) for above in (8, 8, 32)]
    blobs = [blob_of(index) for index in indexes]
    assert blobs[0] == blobs[1] != blobs[2]
    index = indexes[0]
    assert index.num_lists == len(centroids_of(index)) == 32
    index.fill(codes(), np.arange(NUM_VECTORS))
    _, ids = index.search(codes()[:60], 30, 4)
    near = exact_squared(codes()[:60], codes())
    found = np.take_along_axis(near, np.maximum(ids, 0), axis=1).mean()
    assert found < 0.2 * near.mean()


def test_filling_in_pieces_gives_the_same_index(monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = []
    for rows in (NUM_VECTORS, 64):
        monkeypatch.setattr(engine, "_FILL_ROWS", rows)
        blobs.append(blob_of(filled("IVF8,PQ3x4")))
    assert blobs[0] == blobs[1]


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,PQ3x4", "IVF16,PQ4x8", "IVF64_HNSW4,PQ4x4"])
def test_bytes_of_the_files_are_foretold(factory: str, tmp_path: Path) -> None:
    index = trained(factory)
    index.write(tmp_path / "trained")
    index.fill(codes(), np.arange(NUM_VECTORS))
    index.write(tmp_path / "shard-0")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert Index.make(factory, DIM).num_bytes(NUM_VECTORS, 2) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("factory", ["IVF8,Flat", "PCA8,IVF8,Flat", "IVF8,PQ6x4fs", "IVF8_HNSW8,SQ8"])
def test_other_inverted_files_fill_and_find(factory: str) -> None:
    index = filled(factory, first_id=5)
    assert index.num_vectors == NUM_VECTORS
    _, ids = index.lists()
    assert sorted(ids) == list(range(5, NUM_VECTORS + 5))
    distances, ids = index.search(codes()[:50], 10, 8)
    assert (np.diff(distances, axis=1) >= 0).all() and (ids >= 5).all()


def test_search_is_sorted_by_distance_and_id() -> None:
    parts = copies(trained("IVF8,Flat"), 2)
    for part, shard in enumerate(parts):
        shard.fill(codes()[part::2], np.arange(part, NUM_VECTORS, 2))
    queries = codes(40, seed=9)
    all_distances = exact_squared(queries, codes())
    order = np.lexsort((np.broadcast_to(np.arange(NUM_VECTORS), all_distances.shape), all_distances), axis=1)
    distances, ids = Index.join(parts).search(queries, NUM_VECTORS + 3, 8)
    assert np.array_equal(ids[:, :NUM_VECTORS], order)
    assert np.array_equal(distances[:, :NUM_VECTORS], np.take_along_axis(all_distances, order, axis=1))
    assert (ids[:, NUM_VECTORS:] == -1).all() and np.isinf(distances[:, NUM_VECTORS:]).all()


def test_ids_beyond_32_bits_keep_the_order() -> None:
    distances = np.array([[2.0, 1.0, 1.0, np.inf]], np.float32)
    ids = np.array([[7, 1 << 40, 3, -1]])
    found_distances, found_ids = engine._in_order(distances, ids)
    assert found_ids.tolist() == [[3, 1 << 40, 7, -1]]
    assert found_distances.tolist() == [[1, 1, 2, np.inf]]
    assert engine._in_order(distances, np.array([[7, 9, 3, -1]]))[1].tolist() == [[3, 9, 7, -1]]


def test_stock_faiss_reads_what_is_written(shards: list[Index], tmp_path: Path) -> None:
    shards[0].write(tmp_path / "shard")
    stock = faiss.read_index(str(tmp_path / "shard"))
    stock.nprobe = 8
    _, ids = stock.search(codes()[:30].astype(np.float32), 20)
    ours = Index.read(tmp_path / "shard")
    _, expected = ours.search(codes()[:30], 20, 8)
    assert np.mean([len(set(a) & set(b)) for a, b in zip(ids, expected, strict=True)]) > 15


def test_a_damaged_index_is_refused(shards: list[Index], tmp_path: Path) -> None:
    path = tmp_path / "shard"
    shards[0].write(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedDataError, match="run the stage"):
        Index.read(path)
