"""The engine against brute force over integers, and stock faiss on its files."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.engines import faiss as engine

NUM_VECTORS, DIM = 700, 12


def codes(num_vectors: int = NUM_VECTORS, dim: int = DIM, seed: int = 0, spread: int = 6) -> np.ndarray:
    """Few distinct numbers, so that distances tie often."""
    generator = np.random.default_rng(seed)
    centres = generator.integers(-60, 60, size=(9, dim))
    noise = generator.integers(-spread, spread, (num_vectors, dim))
    return (centres[generator.integers(0, 9, num_vectors)] + noise).astype(np.int8)


def exact_squared(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return ((queries[:, None].astype(np.int64) - keys[None].astype(np.int64)) ** 2).sum(-1)


def centroids_of(index: faiss.Index) -> np.ndarray:
    return index.quantizer.reconstruct_n(0, index.nlist)


@pytest.fixture(scope="module")
def shards() -> list[faiss.Index]:
    """Three shards of one trained index; the last is empty."""
    trained = engine.train(codes(), "IVF8,PQ3x4", seed=1)
    blob = faiss.serialize_index(trained)
    parts = [faiss.deserialize_index(blob) for _ in range(3)]
    for start in range(0, NUM_VECTORS, 100):
        engine.fill(
            parts[start // 100 % 2],
            codes()[start : start + 100],
            np.arange(start, min(start + 100, NUM_VECTORS)),
        )
    return parts


@pytest.mark.parametrize(
    ("num_vectors", "dim", "factory"),
    [
        (350_000, 256, "IVF1024,PQ64"),
        (10**6, 256, "IVF4096,PQ64"),
        (10**7, 256, "IVF16384,PQ64"),
        (5000, 16, "IVF16,PQ4x4"),
        (20_000, 30, "IVF64,PQ6"),
        (20_000, 7, "IVF64,PQ1"),
        (300, 16, "IVF1,Flat"),
        (1, 3, "IVF1,Flat"),
    ],
)
def test_automatic_factory(num_vectors: int, dim: int, factory: str) -> None:
    assert engine.choose_factory(num_vectors, dim)[0] == factory
    assert engine.check_factory(factory, dim, num_vectors) >= 1
    num_lists = int(factory[3:].split(",")[0])
    assert num_lists == 1 or num_vectors / num_lists >= 39


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("IVF16,PQ5", "does not fit vectors of 12"),
        ("nonsense", "does not fit"),
        ("Flat", "must hold IVF"),
        ("IVF1024,Flat", "at least 1,024 keys"),
        ("IVF4,PQ4", None),
        ("IVF4,PQ4x10", "at least 1,024 keys"),
    ],
)
def test_factories_are_checked(factory: str, words: str | None) -> None:
    if words is None:
        assert engine.check_factory(factory, DIM, NUM_VECTORS) == 4
    else:
        with pytest.raises(ValueError, match=words):
            engine.check_factory(factory, DIM, NUM_VECTORS)


def test_integer_centroids_survive_more_lists_than_distinct_codes() -> None:
    few = np.repeat(codes(3), 20, axis=0)
    centroids = engine.integer_centroids(few, 6, seed=0)
    assert exact_squared(few, centroids).min(1).max() == 0


def test_assignment_is_exact_and_independent_of_the_batch(shards: list[faiss.Index]) -> None:
    queries = codes(seed=5)
    centroids = centroids_of(shards[0])
    assert np.array_equal(centroids, np.rint(centroids))
    distances = exact_squared(queries, centroids)
    expected = np.lexsort((np.broadcast_to(np.arange(8), distances.shape), distances), axis=1)
    for nprobe in (1, 3, 8, 20):
        assert np.array_equal(engine.assign(shards[0], queries, nprobe), expected[:, :nprobe])
    pieces = [engine.assign(shards[0], queries[start : start + 13], 3) for start in range(0, NUM_VECTORS, 13)]
    assert np.array_equal(np.concatenate(pieces), expected[:, :3])


def test_inverted_lists_join_the_shards(shards: list[faiss.Index]) -> None:
    offsets, ids = engine.inverted_lists(shards)
    assert offsets.tolist()[0] == 0 and offsets[-1] == NUM_VECTORS and sorted(ids) == list(range(NUM_VECTORS))
    nearest = engine.assign(shards[0], codes(), 1)[:, 0]
    for number in range(8):
        assert np.array_equal(ids[offsets[number] : offsets[number + 1]], np.flatnonzero(nearest == number))


def test_inverted_lists_of_nothing(shards: list[faiss.Index]) -> None:
    offsets, ids = engine.inverted_lists(shards[2:])
    assert offsets.tolist() == [0] * 9 and ids.dtype == np.int64 and not len(ids)


@pytest.mark.parametrize(
    ("memory_bytes", "factory", "words"),
    [
        (None, "IVF16384,PQ64", "8 bits for each 4"),
        (10**9, "IVF16384,PQ32", "more than half of 1.0 GB"),
        (1, "IVF16384,PQ16", "half"),
    ],
)
def test_automatic_factory_in_little_memory(memory_bytes: int | None, factory: str, words: str) -> None:
    found, reason = engine.choose_factory(10**7, 256, memory_bytes)
    assert found == factory and words in reason


@pytest.mark.parametrize("factory", ["IVF32,Flat", "PCA8,IVF32,PQ4x4", "OPQ3,IVF32,PQ3x4", "IVF32,SQ8"])
def test_two_levels_of_lists(factory: str) -> None:
    """Trained in two levels every index finds a code by probing its nearest lists, whatever stands before
    them."""
    indexes = [engine.train(codes(), factory, seed=1, two_level_above=above) for above in (8, 8, 32)]
    blobs = [faiss.serialize_index(index).tobytes() for index in indexes]
    assert blobs[0] == blobs[1] != blobs[2]
    index = indexes[0]
    assert faiss.extract_index_ivf(index).quantizer.ntotal == 32
    engine.fill(index, codes(), np.arange(NUM_VECTORS))
    _, ids = engine.search([index], codes()[:60], 30, 4)
    near = exact_squared(codes()[:60], codes())
    found = np.take_along_axis(near, np.maximum(ids, 0), axis=1).mean()
    assert found < 0.2 * near.mean()


def test_a_gpu_build_of_faiss_trains_float_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """With GPUs the k-means of floats is handed to them; codes stay in whole numbers, so their index is the
    same."""
    expected = [
        faiss.serialize_index(engine.train(vectors, "IVF8,Flat", seed=1))
        for vectors in (codes(), codes() / 2)
    ]
    handed: list[object] = []

    def clone(index: object) -> object:
        handed.append(index)
        return index

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", clone, raising=False)
    assert engine.num_gpus() == 2
    for vectors, blob, calls in zip((codes(), codes() / 2), expected, (0, 1), strict=True):
        assert np.array_equal(faiss.serialize_index(engine.train(vectors, "IVF8,Flat", seed=1)), blob)
        assert len(handed) == calls


def test_filling_in_pieces_gives_the_same_index(monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = []
    for rows in (NUM_VECTORS, 64):
        monkeypatch.setattr(engine, "_FILL_ROWS", rows)
        index = engine.train(codes(), "IVF8,PQ3x4", seed=1)
        engine.fill(index, codes(), np.arange(NUM_VECTORS))
        blobs.append(faiss.serialize_index(index))
    assert np.array_equal(*blobs)


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,PQ3x4", "IVF16,PQ4x8"])
def test_bytes_of_the_files_are_foretold(factory: str, tmp_path: Path) -> None:
    index = engine.train(codes(), factory, seed=1)
    engine.write_index(index, tmp_path / "trained")
    engine.fill(index, codes(), np.arange(NUM_VECTORS))
    engine.write_index(index, tmp_path / "shard-0")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert engine.index_bytes(factory, DIM, NUM_VECTORS, 1) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("factory", ["IVF8,Flat", "PCA8,IVF8,Flat", "IVF8,PQ6x4fs", "IVF8_HNSW8,SQ8"])
def test_other_inverted_files_fill_and_find(factory: str) -> None:
    index = engine.train(codes(), factory, seed=1)
    engine.fill(index, codes(), np.arange(NUM_VECTORS) + 5)
    assert index.ntotal == NUM_VECTORS
    _, ids = engine.inverted_lists([index])
    assert sorted(ids) == list(range(5, NUM_VECTORS + 5))
    distances, ids = engine.search([index], codes()[:50], 10, 8)
    assert (np.diff(distances, axis=1) >= 0).all() and (ids >= 5).all()


def test_search_over_shards_is_sorted_by_distance_and_id() -> None:
    trained = engine.train(codes(), "IVF8,Flat", seed=1)
    blob = faiss.serialize_index(trained)
    parts = [faiss.deserialize_index(blob) for _ in range(2)]
    for part, shard in enumerate(parts):
        engine.fill(shard, codes()[part::2], np.arange(part, NUM_VECTORS, 2))
    queries = codes(40, seed=9)
    all_distances = exact_squared(queries, codes())
    order = np.lexsort((np.broadcast_to(np.arange(NUM_VECTORS), all_distances.shape), all_distances), axis=1)
    distances, ids = engine.search(parts, queries, NUM_VECTORS + 3, 8)
    assert np.array_equal(ids[:, :NUM_VECTORS], order)
    assert np.array_equal(distances[:, :NUM_VECTORS], np.take_along_axis(all_distances, order, axis=1))
    assert (ids[:, NUM_VECTORS:] == -1).all() and np.isinf(distances[:, NUM_VECTORS:]).all()


def test_ids_beyond_32_bits_keep_the_order() -> None:
    distances = np.array([[2.0, 1.0, 1.0, np.inf]], np.float32)
    ids = np.array([[7, 1 << 40, 3, -1]])
    found_distances, found_ids = engine._merge(distances, ids, 3)
    assert found_ids.tolist() == [[3, 1 << 40, 7]] and found_distances.tolist() == [[1, 1, 2]]
    assert engine._merge(distances, np.array([[7, 9, 3, -1]]), 3)[1].tolist() == [[3, 9, 7]]


def test_stock_faiss_reads_what_is_written(shards: list[faiss.Index], tmp_path: Path) -> None:
    engine.write_index(shards[0], tmp_path / "shard")
    stock = faiss.read_index(str(tmp_path / "shard"))
    stock.nprobe = 8
    _, ids = stock.search(codes()[:30].astype(np.float32), 20)
    ours = engine.read_index(tmp_path / "shard")
    _, expected = engine.search([ours], codes()[:30], 20, 8)
    assert np.mean([len(set(a) & set(b)) for a, b in zip(ids, expected, strict=True)]) > 15


def test_a_damaged_index_is_refused(shards: list[faiss.Index], tmp_path: Path) -> None:
    path = tmp_path / "shard"
    engine.write_index(shards[0], path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedDataError, match="run the stage"):
        engine.read_index(path)
