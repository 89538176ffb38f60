"""The search in torch gives what the search on the CPU gives, bit for bit for codes; its own path is run on
the CPU as well."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlpmem_ds.maths import knn, knn_on_device
from mlpmem_ds.maths.distances import padded_products
from mlpmem_ds.maths.exact_limit import max_keys_for_exact
from mlpmem_ds.maths.knn import Exclusion, Neighbours, exact_neighbours, list_neighbours
from mlpmem_ds.maths.knn_on_device import DeviceKeys, HostKeys, exact_neighbours_on_device, load_keys
from mlpmem_ds.maths.listed_keys import in_list_order
from mlpmem_ds.maths.neighbours import PackedNeighbours

NUM_KEYS, DIM = 3000, 6
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda:0"), marks=[NO_GPU, pytest.mark.gpu])]


def codes(num_rows: int = NUM_KEYS, seed: int = 0) -> np.ndarray:
    """Few distinct numbers, so that distances tie often."""
    return np.random.default_rng(seed).integers(-4, 5, (num_rows, DIM)).astype(np.int8)


def exclusions(ids: np.ndarray) -> list[Exclusion | None]:
    first = ids // 700 * 700
    return [
        None,
        Exclusion(query_ids_Q=ids),
        Exclusion(query_ids_Q=ids, window=9, first_hidden_Q=first, stop_hidden_Q=first + 700),
    ]


def assert_same(packed: PackedNeighbours, expected: Neighbours) -> None:
    found = packed.rows(slice(None))
    np.testing.assert_array_equal(found.ids_QK, expected.ids_QK)
    np.testing.assert_array_equal(found.distances_QK, expected.distances_QK)
    assert (
        found.ids_QK.dtype == expected.ids_QK.dtype
        and found.distances_QK.dtype == expected.distances_QK.dtype
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 40, 2048, NUM_KEYS + 5])
def test_exact_is_the_same(device: torch.device, k: int) -> None:
    ids = np.arange(0, NUM_KEYS, 97)
    for exclusion in exclusions(ids):
        expected = exact_neighbours(codes()[ids], codes(), k, exclusion=exclusion)
        for blocks in ({}, {"query_block": 7, "key_block": 2100}):
            keys = load_keys(codes(), device)
            found = exact_neighbours_on_device(codes()[ids], keys, k, exclusion=exclusion, **blocks)
            assert_same(found, expected)


def test_keys_that_do_not_fit_come_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert isinstance(load_keys(codes(), device), DeviceKeys)
    monkeypatch.setattr(knn_on_device, "fits", lambda *_: False)
    keys = load_keys(codes(), device)
    assert isinstance(keys, HostKeys)
    found = exact_neighbours_on_device(codes()[:40], keys, 30, exclusion=None, key_block=700)
    assert_same(found, exact_neighbours(codes()[:40], codes(), 30, exclusion=None))


@pytest.mark.parametrize("device", DEVICES)
def test_float_keys_find_the_same_neighbours(device: torch.device) -> None:
    keys = np.random.default_rng(5).standard_normal((500, 16)).astype(np.float16)
    expected = exact_neighbours(keys, keys, 9, exclusion=Exclusion(query_ids_Q=np.arange(500)))
    exclusion = Exclusion(query_ids_Q=np.arange(500))
    found = exact_neighbours_on_device(keys, load_keys(keys, device), 9, exclusion=exclusion).rows(
        slice(None)
    )
    assert np.mean(found.ids_QK == expected.ids_QK) > 0.99
    np.testing.assert_allclose(found.distances_QK, expected.distances_QK, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("num_queries", "num_keys", "num_dims"), [(1, 1, 2), (17, 8, 8), (5, 23, 13)])
def test_padding_changes_no_product(num_queries: int, num_keys: int, num_dims: int) -> None:
    generator = np.random.default_rng(0)
    left, right = (
        generator.integers(-128, 128, (rows, num_dims)).astype(np.int8) for rows in (num_queries, num_keys)
    )
    found = padded_products(torch.from_numpy(left), torch.from_numpy(right))
    np.testing.assert_array_equal(found.numpy(), left.astype(np.int64) @ right.T.astype(np.int64))


def test_the_given_gpu_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, device = [], torch.device("cuda:3")
    nothing = PackedNeighbours(packed_QK=np.empty((0, 3), np.int64), id_bits=1, is_integer=True)
    monkeypatch.setattr(knn, "load_keys", lambda keys, device: HostKeys(keys_ND=keys, device=device))
    monkeypatch.setattr(
        knn, "exact_neighbours_on_device", lambda _, keys, *__, **___: calls.append(keys.device) or nothing
    )
    monkeypatch.setattr(
        knn, "list_neighbours_on_device", lambda *_, device, **__: calls.append(device) or nothing
    )
    exact_neighbours(codes(2), codes(), 3, exclusion=None, device=device)
    lists = in_list_order(codes(), np.array([0, 1]), np.array([0]))
    list_neighbours(codes(2), np.zeros((2, 1), int), lists, 3, exclusion=None, device=device)
    assert calls == [device, device]


def test_exact_search_wants_all_keys_in_half_of_a_gpu() -> None:
    assert max_keys_for_exact("cpu", key_bytes=8192) == 200_000
    assert max_keys_for_exact("cuda") == max_keys_for_exact("cuda", 256, 80 * 10**9) == 10_000_000
    assert max_keys_for_exact("cuda", key_bytes=8192, device_bytes=80 * 10**9) == 4_882_812
