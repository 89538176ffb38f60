"""Nearest centroids against brute force over integers; k-means in whole numbers, in one level and in two."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlpmem_ds.benchmarks.scale.operations import CountedOperations
from mlpmem_ds.maths import centroids as module
from mlpmem_ds.maths.centroids import (
    CentroidTable,
    integer_centroids,
    nearest_centroids,
    rows_of_tile,
    two_level_centroids,
)
from mlpmem_ds.maths.device_memory import fits, free_bytes, tile_bytes
from mlpmem_ds.maths.distances import pad_codes, squared_norms

NUM_VECTORS, DIM = 2500, 12


def codes(num_vectors: int = NUM_VECTORS, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).integers(-60, 60, size=(40, DIM))
    noise = generator.integers(-9, 10, (num_vectors, DIM))
    return (centres[generator.integers(0, 40, num_vectors)] + noise).astype(np.int8)


def exact_squared(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    return ((vectors[:, None].astype(np.int64) - others[None].astype(np.int64)) ** 2).sum(-1)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("count", [1, 2, 17, 33, 50])
def test_nearest_equals_brute_force(monkeypatch: pytest.MonkeyPatch, on_device: bool, count: int) -> None:
    """Also as an accelerator selects; in tiles of 7 vectors; of 33 centroids 3 are equal to others."""
    monkeypatch.setattr(module, "_TILE_ELEMENTS", 33 * 7)
    if on_device:
        monkeypatch.setattr(module, "_nearest_on_host", module._nearest_on_device)
        monkeypatch.setattr(module, "tile_bytes", lambda _: 33 * 7 * 16)
    vectors, others = codes(100, seed=4), codes(33, seed=5)
    others[10:13] = others[:3]
    distances = exact_squared(vectors, others)
    order = np.lexsort((np.broadcast_to(np.arange(33), distances.shape), distances), axis=1)[:, :count]
    numbers, found = nearest_centroids(torch.from_numpy(vectors), torch.from_numpy(others), count)
    np.testing.assert_array_equal(numbers, order)
    np.testing.assert_array_equal(found, np.take_along_axis(distances, order, axis=1))
    assert (numbers.dtype, found.dtype) == (np.int64, np.float32)
    padded = pad_codes(torch.from_numpy(others), -33 % 8)  # as a GPU wants them
    assert padded.shape == (40, 16)
    table = CentroidTable(centroids_LD=padded, norms_L=squared_norms(padded), num_lists=33)
    if on_device:
        assert np.array_equal(nearest_centroids(torch.from_numpy(vectors), table, count)[0], order)
    floats = torch.from_numpy(vectors).float(), torch.from_numpy(others).float()
    numbers, found = nearest_centroids(*floats, count)
    np.testing.assert_array_equal(found, np.take_along_axis(distances, order, axis=1))


def test_a_tile_on_a_gpu_is_as_large_as_its_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (78 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**9)
    device = torch.device("cuda:3")
    assert free_bytes(device) == 80 * 10**9 and fits(40 * 10**9, device) and not fits(41 * 10**9, device)
    assert rows_of_tile(262_144, tile_bytes(device)) >= 1024
    assert rows_of_tile(2**33, tile_bytes(device)) == 1


def test_a_tile_on_a_device_takes_few_operations_and_copies_no_centroid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU each operation is a launch, and each copy to the host a wait."""
    monkeypatch.setattr(module, "_nearest_on_host", module._nearest_on_device)
    vectors, others = torch.zeros((96, 16), dtype=torch.int8), torch.zeros((40, 16), dtype=torch.int8)
    counts = []
    for rows in (96, 24):
        monkeypatch.setattr(module, "tile_bytes", lambda _, rows=rows: rows * 40 * 16)
        with CountedOperations() as counted:
            nearest_centroids(vectors, CentroidTable.of(others), 5)
        assert not [name for name in counted.names if "pad" in name or "clone" in name]
        counts.append(len(counted.names))
    assert counts[1] - counts[0] <= 3 * 12  # three tiles more


@pytest.mark.parametrize("two_level_above", [64, 8])
def test_k_means_is_the_same_on_any_number_of_threads(two_level_above: int) -> None:
    found, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(integer_centroids(codes(), 64, seed=3, two_level_above=two_level_above))
    torch.set_num_threads(threads)
    assert found[0].dtype == np.int8 and found[0].shape == (64, DIM) and np.array_equal(*found)


def test_two_levels_are_nearly_as_good_as_one() -> None:
    other = codes(seed=8)  # not trained on
    errors = [
        exact_squared(other, integer_centroids(codes(), 100, seed=1, two_level_above=above)).min(1).mean()
        for above in (100, 99)
    ]
    drawn = exact_squared(other, codes()[:100]).min(1).mean()
    assert errors[1] < 1.1 * errors[0] < 0.8 * drawn


def test_a_list_for_each_vector() -> None:
    few = np.unique(codes(30), axis=0)
    for above in (len(few), 5):
        found = integer_centroids(few, len(few), seed=0, two_level_above=above)
        assert np.array_equal(np.unique(found, axis=0), few)


def test_shares_of_the_second_level_follow_the_groups() -> None:
    """One group of 90 and one of 10 vectors share 20 lists as 18 and 2."""
    vectors = np.concatenate([np.zeros((90, 2)), np.full((10, 2), 100)]).astype(np.float32)
    calls = []

    def cluster(part: np.ndarray, count: int) -> np.ndarray:
        calls.append((len(part), count))
        return np.array([[0, 0], [100, 100]], np.float32)[:count] if len(calls) == 1 else part[:count]

    vectors = vectors[np.random.default_rng(0).permutation(100)]
    cluster_two = two_level_centroids(vectors, 5, cluster)  # floor(sqrt(5)) = 2 first
    assert calls == [(100, 2), (90, 4), (10, 1)] and len(cluster_two) == 5
