"""List search in torch gives what that on the CPU gives, bit for bit for codes, in few operations; its own
path is run on the CPU as well."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_ds.benchmarks.scale.operations import CountedOperations
from mlpmem_ds.maths import list_tiles
from mlpmem_ds.maths.knn import pack_list_neighbours
from mlpmem_ds.maths.listed_keys import ListedKeys, in_list_order, run_of
from mlpmem_ds.maths.lists_on_device import list_neighbours_on_device
from mlpmem_ds.maths.neighbours import Exclusion, merge_neighbours

NUM_KEYS, NUM_LISTS, DIM = 3000, 10, 6
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda:0"), marks=[NO_GPU, pytest.mark.gpu])]


def codes(num_rows: int = NUM_KEYS, dim: int = DIM, seed: int = 0) -> np.ndarray:
    """Few distinct numbers, so that distances tie often."""
    return np.random.default_rng(seed).integers(-4, 5, (num_rows, dim)).astype(np.int8)


def lists_of_keys() -> np.ndarray:
    """Of quite different sizes; the last stays empty."""
    shares = np.array([40, 20, 10, 10, 8, 5, 4, 2, 1])
    return np.random.default_rng(3).choice(9, NUM_KEYS, p=shares / shares.sum())


def listed(keys: np.ndarray) -> ListedKeys:
    lists_N = lists_of_keys()
    offsets = np.concatenate([[0], np.cumsum(np.bincount(lists_N, minlength=NUM_LISTS))])
    return in_list_order(keys, offsets, np.argsort(lists_N, kind="stable").astype(np.uint32))


def in_runs(keys: np.ndarray, run_keys: int) -> ListedKeys:
    runs, lists_N = [], lists_of_keys()
    for first in range(0, NUM_KEYS, run_keys):
        lists_R = lists_N[first : first + run_keys]
        order_R = np.argsort(lists_R, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(lists_R, minlength=NUM_LISTS))])
        runs.append(run_of(first, offsets, order_R.astype(np.uint32), keys[first + order_R]))
    return ListedKeys(runs=runs, num_keys=NUM_KEYS)


def probes_of(num_queries: int) -> np.ndarray:
    generator = np.random.default_rng(7)
    probes = np.stack([generator.permutation(NUM_LISTS)[:4] for _ in range(num_queries)])
    probes[::5, 2] = -1
    probes[1] = -1
    return probes


def exclusions(ids: np.ndarray) -> list[Exclusion | None]:
    first = ids // 700 * 700
    return [
        None,
        Exclusion(query_ids_Q=ids),
        Exclusion(query_ids_Q=ids, window=9),
        Exclusion(query_ids_Q=ids, window=9, first_hidden_Q=first, stop_hidden_Q=first + 700),
    ]


def assert_same(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found.packed_QK, expected.packed_QK)
    assert (found.id_bits, found.is_integer) == (expected.id_bits, expected.is_integer)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("budget", [1, 200_000, None])
@pytest.mark.parametrize("k", [1, 30, 1500])
def test_lists_are_the_same(
    device: torch.device, budget: int | None, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed neighbours, ties and all; also where tiles are cut in both directions."""
    if budget:
        monkeypatch.setattr(list_tiles, "_PAIRS", 7)
        monkeypatch.setattr(list_tiles, "_KEYS", 100)
    ids = np.arange(0, NUM_KEYS, 61)
    arguments = (codes()[ids], probes_of(len(ids)))
    for exclusion in exclusions(ids):
        expected = pack_list_neighbours(*arguments, listed(codes()), k, exclusion=exclusion)
        assert (expected.count() < k).any()
        for lists in (listed(codes()), in_runs(codes(), 1000)):
            found = list_neighbours_on_device(
                *arguments, lists, k, exclusion=exclusion, device=device, budget=budget
            )
            assert_same(found, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_groups_merged_are_all_lists(device: torch.device) -> None:
    ids = np.arange(0, NUM_KEYS, 61)
    arguments, exclusion = (codes()[ids], probes_of(len(ids))), Exclusion(query_ids_Q=ids)
    whole = in_runs(codes(), 700)
    expected = pack_list_neighbours(*arguments, whole, 80, exclusion=exclusion)
    parts = []
    for first, stop in ((6, 10), (0, 1), (1, 1), (1, 6)):
        group = whole.group(first, stop, device)
        assert group.device == device and group.num_lists == stop - first
        found = list_neighbours_on_device(*arguments, group, 80, exclusion=exclusion, device=device)
        if device == CPU:
            assert_same(pack_list_neighbours(*arguments, group, 80, exclusion=exclusion), found)
        parts.append(found)
    assert_same(merge_neighbours(parts), expected)
    with pytest.raises(ValueError, match="there are 10 lists"):
        list_neighbours_on_device(
            codes(2), np.full((2, 1), 10), whole.group(0, 4), 1, exclusion=None, device=CPU
        )


def test_lists_that_do_not_fit_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at a time as there is room for; a group on another device is such a case too."""
    monkeypatch.setattr(ListedKeys, "num_bytes", property(lambda _: 5000))
    ids = np.arange(0, NUM_KEYS, 61)
    arguments, whole = (codes()[ids], probes_of(len(ids))), in_runs(codes(), 700)
    for lists in (whole, ListedKeys(runs=whole.runs, num_keys=NUM_KEYS)):
        expected = pack_list_neighbours(*arguments, lists, 40, exclusion=None)
        found = list_neighbours_on_device(*arguments, lists, 40, exclusion=None, device=CPU)
        assert_same(found, expected)


@pytest.mark.parametrize("dim", [1, 1100])
def test_codes_of_any_size_are_exact(dim: int) -> None:
    generator = np.random.default_rng(0)
    keys = generator.integers(-128, 128, (NUM_KEYS, dim)).astype(np.int8)
    keys[:50], keys[50:100] = -128, 127
    ids = np.arange(0, NUM_KEYS, 11)
    arguments = (keys[ids], probes_of(len(ids)), listed(keys), 50)
    expected = pack_list_neighbours(*arguments, exclusion=None)
    assert_same(list_neighbours_on_device(*arguments, exclusion=None, device=CPU), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_float_keys_find_the_same_neighbours(device: torch.device) -> None:
    keys = np.random.default_rng(5).standard_normal((NUM_KEYS, 16)).astype(np.float16)
    keys[5, 0] = np.nan
    ids = np.arange(0, NUM_KEYS, 61)
    arguments, exclusion = (keys[ids], probes_of(len(ids)), listed(keys), 30), Exclusion(query_ids_Q=ids)
    expected = pack_list_neighbours(*arguments, exclusion=exclusion).unpack()
    found = list_neighbours_on_device(*arguments, exclusion=exclusion, device=device).unpack()
    assert np.mean(found.ids_QK == expected.ids_QK) > 0.99
    np.testing.assert_allclose(found.distances_QK, expected.distances_QK, rtol=1e-4, atol=1e-4)


def test_no_queries_no_probes_no_lists() -> None:
    for num_queries, num_probes in ((0, 4), (3, 0)):
        probes = np.zeros((num_queries, num_probes), np.int64)
        found = list_neighbours_on_device(
            codes(num_queries), probes, listed(codes()), 5, exclusion=None, device=CPU
        )
        assert found.packed_QK.shape == (num_queries, 5) and not found.count().any()


def test_operations_do_not_grow_with_lists_or_queries() -> None:
    """On a GPU each is a launch."""
    counts = []
    for ids in (np.arange(0, NUM_KEYS, 12), np.arange(NUM_KEYS)):
        arguments = (codes()[ids], probes_of(len(ids)), listed(codes()), 20)
        with CountedOperations() as counted:
            list_neighbours_on_device(
                *arguments, exclusion=Exclusion(query_ids_Q=ids), device=CPU, budget=2**30
            )
        counts.append(len(counted.names))
    assert counts[1] < 2 * counts[0] < 3000
