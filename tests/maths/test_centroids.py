"""Nearest centroids against brute force over integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlpmem_ds.benchmarks.scale.operations import CountedOperations
from mlpmem_ds.maths import centroids as module
from mlpmem_ds.maths.centroids import CentroidTable, nearest_centroids, rows_of_tile
from mlpmem_ds.maths.device_memory import fits, free_bytes, tile_bytes
from mlpmem_ds.maths.distances import pad_codes, squared_norms

from .toy_codes import codes, exact_squared


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("count", [1, 9])
def test_a_gpu_finds_the_same(count: int) -> None:
    vectors, others = torch.from_numpy(codes(100, seed=4)), torch.from_numpy(codes(33, seed=5))
    others[10:13] = others[:3]
    expected = nearest_centroids(vectors, others, count)
    for table in (others.cuda(), CentroidTable.of(others.cuda())):
        for part, wanted in zip(nearest_centroids(vectors, table, count), expected, strict=True):
            np.testing.assert_array_equal(part, wanted)


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
