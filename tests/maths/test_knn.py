"""Neighbours against brute force in int64 and float64. Shape legend as in the module."""

import warnings

import numpy as np
import pytest
import torch

from mlpmem_ds.maths import distances, knn
from mlpmem_ds.maths.distances import norms_of_codes, squared_distances
from mlpmem_ds.maths.knn import (
    Exclusion,
    Neighbours,
    exact_neighbours,
    list_neighbours,
    pack_list_neighbours,
)
from mlpmem_ds.maths.listed_keys import ListedKeys, in_list_order, run_of
from mlpmem_ds.maths.neighbours import merge_neighbours

MISSING = np.iinfo(np.int64).max


def codes_of(num_rows, num_dims, seed=0, low=-128, high=128):
    return np.random.default_rng(seed).integers(low, high, (num_rows, num_dims), dtype=np.int8)


def brute_force(queries_QD, keys_ND, k, allowed_QN):
    distances_QN = ((queries_QD[:, None].astype(np.int64) - keys_ND[None].astype(np.int64)) ** 2).sum(2)
    ids_QK = np.full((len(queries_QD), k), -1)
    distances_QK = np.full((len(queries_QD), k), MISSING)
    for row, allowed_N in enumerate(allowed_QN):
        found = sorted(
            (distance, key) for key, distance in enumerate(distances_QN[row].tolist()) if allowed_N[key]
        )[:k]
        ids_QK[row, : len(found)] = [key for _, key in found]
        distances_QK[row, : len(found)] = [distance for distance, _ in found]
    return Neighbours(ids_QK=ids_QK, distances_QK=distances_QK)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.ids_QK, expected.ids_QK)
    np.testing.assert_array_equal(found.distances_QK, expected.distances_QK)


def inverted_lists(num_keys, num_lists, seed=1):
    """Some lists stay empty; ids within a list are in no order."""
    rng = np.random.default_rng(seed)
    list_of_key_N = rng.integers(0, num_lists - 1, num_keys)
    shuffled_N = rng.permutation(num_keys)
    list_ids_N = shuffled_N[np.argsort(list_of_key_N[shuffled_N], kind="stable")]
    offsets_L1 = np.concatenate([[0], np.cumsum(np.bincount(list_of_key_N, minlength=num_lists))])
    return list_of_key_N, offsets_L1, list_ids_N


def in_runs(keys_ND, list_of_key_N, num_lists, run_keys):
    """As a large datastore is written: each run of positions list by list, ids counted from the run's
    first."""
    runs = []
    for first in range(0, len(keys_ND), run_keys):
        lists_R = list_of_key_N[first : first + run_keys]
        order_R = np.argsort(lists_R, kind="stable")
        offsets_L1 = np.concatenate([[0], np.cumsum(np.bincount(lists_R, minlength=num_lists))])
        runs.append(run_of(first, offsets_L1, order_R.astype(np.uint32), keys_ND[first + order_R]))
    return ListedKeys(runs=runs, num_keys=len(keys_ND))


@pytest.mark.parametrize("num_dims", [1, 7, 256, 1040, 2049])
def test_integer_distances_are_exact_at_the_extremes(num_dims):
    queries = np.concatenate(
        [codes_of(5, num_dims), np.full((1, num_dims), -128), np.full((1, num_dims), 127)]
    ).astype(np.int8)
    expected = ((queries[:, None].astype(np.int64) - queries[None].astype(np.int64)) ** 2).sum(2)
    distances = squared_distances(torch.from_numpy(queries), torch.from_numpy(queries))
    assert distances.dtype == torch.int32
    np.testing.assert_array_equal(distances.numpy(), expected)
    assert distances.max() == num_dims * 255**2


@pytest.mark.parametrize("num_dims", [3, 1024, 2049])
def test_without_an_exact_integer_product_distances_are_the_same(monkeypatch, num_dims):
    queries, keys = torch.from_numpy(codes_of(9, num_dims)), torch.from_numpy(codes_of(14, num_dims, seed=1))
    keys[0], keys[1], queries[0] = (
        127,
        -128,
        127,
    )  # 127 * 127 * 2049 is odd and above 2**24: no float32 holds it
    expected = squared_distances(queries, keys)
    monkeypatch.setattr(distances, "_may_use_integer_matmul", lambda *_: False)
    out = torch.full((9, 14), 5, dtype=torch.int32)
    assert torch.equal(squared_distances(queries, keys), expected)
    assert torch.equal(squared_distances(queries, keys, out=out), expected)
    assert torch.equal(out, expected)


def test_strided_codes_give_the_same_distances():
    wide = torch.from_numpy(codes_of(20, 64))
    expected = squared_distances(wide[:, :30].clone(), wide[::2, 30:60].clone())
    assert torch.equal(squared_distances(wide[:, :30], wide[::2, 30:60]), expected)
    assert torch.equal(
        squared_distances(wide.t(), wide.t()), squared_distances(wide.t().contiguous(), wide.t().contiguous())
    )


def test_a_saturating_integer_product_is_noticed(monkeypatch):
    distances._cpu_integer_matmul_is_exact.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: (left.float() @ right.float()).int() - 1)
    try:
        assert not distances._cpu_integer_matmul_is_exact()
    finally:
        distances._cpu_integer_matmul_is_exact.cache_clear()


def test_float_distances_are_close_and_not_negative():
    rng = np.random.default_rng(0)
    keys = torch.from_numpy(rng.standard_normal((33, 19)).astype(np.float16))
    distances = squared_distances(keys, keys)
    expected = ((keys[:, None].double() - keys[None].double()) ** 2).sum(2)
    assert distances.dtype == torch.float32 and (distances >= 0).all()
    torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=1e-4)


def test_mismatched_or_too_many_dimensions_are_refused():
    with pytest.raises(ValueError, match="3 dimensions, keys 4"):
        squared_distances(torch.zeros(1, 3), torch.zeros(1, 4))
    wide = torch.zeros(1, 33026, dtype=torch.int8)
    with pytest.raises(ValueError, match="33026 dimensions overflow int32; use at most 33025"):
        squared_distances(wide, wide)


@pytest.mark.parametrize(
    "blocks", [{}, {"query_block": 1, "key_block": 1}, {"query_block": 7, "key_block": 13}]
)
@pytest.mark.parametrize("k", [1, 5, 200])
def test_exact_equals_brute_force_whatever_the_blocks(blocks, k):
    keys = codes_of(101, 5, low=-2, high=3)  # few distinct distances: many ties
    queries = codes_of(23, 5, seed=3, low=-2, high=3)
    expected = brute_force(queries, keys, k, np.ones((23, 101), bool))
    found = exact_neighbours(queries, keys, k, exclusion=None, **blocks)
    assert_same(found, expected)
    assert found.ids_QK.dtype == np.int64 and found.distances_QK.dtype == np.int64


def test_exact_with_more_than_one_growing_block_and_keys_that_come_ever_nearer():
    keys = np.repeat(
        np.arange(127, -128, -1, dtype=np.int8)[:, None], 21, axis=0
    )  # 5,355 keys, each nearer than those before
    queries = np.full((3, 1), -128, np.int8)
    found = exact_neighbours(queries, keys, 50, exclusion=None)
    assert_same(found, brute_force(queries, keys, 50, np.ones((3, len(keys)), bool)))


class AnySelection(np.ndarray):
    """`partition` promises which values are in front of the k-th, not in which order: here it is another than
    that of NumPy's vector instructions."""

    def partition(self, kth, axis=-1):
        sorted_QC = np.sort(np.asarray(self), axis=axis)
        self[:, :kth], self[:, kth:] = sorted_QC[:, :kth][:, ::-1], sorted_QC[:, kth:]


@pytest.mark.parametrize("hidden", [0, 20, 60])
def test_no_neighbour_is_lost_whatever_order_a_selection_leaves(monkeypatch, hidden):
    """Rows with fewer than k neighbours so far next to full ones."""
    original = knn._RunningBest.__init__

    def start(self, *arguments, **words):
        original(self, *arguments, **words)
        self.packed_QC = self.packed_QC.view(AnySelection)

    monkeypatch.setattr(knn._RunningBest, "__init__", start)
    keys, query_ids = codes_of(90, 4, low=-2, high=3), np.array([0, 5, 44, 45, 89])
    hidden_stops = np.array([0, hidden, 0, hidden, 0])
    exclusion = Exclusion(query_ids_Q=query_ids, first_hidden_Q=np.zeros(5, int), stop_hidden_Q=hidden_stops)
    allowed = np.arange(90)[None] != query_ids[:, None]
    allowed &= np.arange(90)[None] >= hidden_stops[:, None]
    for k in (1, 30, 60, 89, 95):
        found = exact_neighbours(keys[query_ids], keys, k, exclusion=exclusion, query_block=3, key_block=11)
        assert_same(found, brute_force(keys[query_ids], keys, k, allowed))


def test_threads_do_not_matter():
    keys = codes_of(3000, 33)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = exact_neighbours(keys[:300], keys, 40, exclusion=None)
        torch.set_num_threads(2)
        two = exact_neighbours(keys[:300], keys, 40, exclusion=None)
    finally:
        torch.set_num_threads(before)
    assert_same(one, two)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("grouped", [False, True])
def test_exclusion_hides_self_window_and_group(window, grouped):
    keys = codes_of(90, 4, low=-2, high=3)
    query_ids = np.array([0, 5, 44, 45, 89])
    documents = query_ids // 30  # of 30 keys each
    allowed = np.abs(np.arange(90)[None] - query_ids[:, None]) > window
    if grouped:
        allowed &= np.arange(90)[None] // 30 != documents[:, None]
    exclusion = Exclusion(
        query_ids_Q=query_ids,
        first_hidden_Q=30 * documents if grouped else None,
        stop_hidden_Q=30 * documents + 30 if grouped else None,
        window=window,
    )
    expected = brute_force(keys[query_ids], keys, 70, allowed)
    assert (expected.ids_QK == -1).any() == grouped
    assert_same(
        exact_neighbours(keys[query_ids], keys, 70, exclusion=exclusion, query_block=2, key_block=17),
        expected,
    )
    list_of_key, offsets, list_ids = inverted_lists(90, 7)
    probes = np.tile(np.arange(7), (5, 1))
    for lists in (in_list_order(keys, offsets, list_ids), in_runs(keys, list_of_key, 7, 40)):
        assert_same(list_neighbours(keys[query_ids], probes, lists, 70, exclusion=exclusion), expected)


@pytest.mark.parametrize("budget", [1, 300, 2**25])
@pytest.mark.parametrize("k", [3, 60])
def test_lists_equal_brute_force_over_the_probed_keys(budget, k):
    keys = codes_of(211, 6, low=-2, high=3)
    queries = codes_of(37, 6, seed=5, low=-2, high=3)
    list_of_key, offsets, list_ids = inverted_lists(211, 11)
    rng = np.random.default_rng(2)
    probes = np.stack([rng.permutation(11)[:4] for _ in queries])
    probes[rng.random(probes.shape) < 0.2] = -1
    probes[3] = -1
    allowed = np.stack([np.isin(list_of_key, row[row >= 0]) for row in probes])
    runs = in_runs(keys, list_of_key, 11, 64)
    for lists in (in_list_order(keys, offsets, list_ids), runs, runs.group(0, 11)):
        found = list_neighbours(queries, probes, lists, k, exclusion=None, candidate_budget=budget)
        assert_same(found, brute_force(queries, keys, k, allowed))
        assert (found.ids_QK[3] == -1).all()
    parts = [
        pack_list_neighbours(queries, probes, runs.group(*group), k, exclusion=None, candidate_budget=budget)
        for group in ((4, 11), (0, 4))
    ]
    assert_same(merge_neighbours(parts).unpack(), brute_force(queries, keys, k, allowed))


def test_all_lists_probed_equal_exact_for_memory_maps(tmp_path):
    keys = codes_of(5000, 32)
    np.save(tmp_path / "codes.npy", keys)
    mapped = np.load(tmp_path / "codes.npy", mmap_mode="r")
    _, offsets, list_ids = inverted_lists(5000, 13)
    exclusion = Exclusion(query_ids_Q=np.arange(600))
    exact = exact_neighbours(mapped[:600], mapped, 64, exclusion=exclusion, query_block=256, key_block=1000)
    probes = np.tile(np.random.default_rng(0).permutation(13), (600, 1))
    lists = in_list_order(keys, offsets, list_ids)
    np.save(tmp_path / "listed.npy", lists.runs[0].keys_ND.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        listed_keys = np.load(tmp_path / "listed.npy", mmap_mode="r")
        run = run_of(0, offsets, lists.runs[0].ids_N, listed_keys, norms_of_codes(listed_keys, block=7))
    lists = ListedKeys(runs=[run], num_keys=5000)
    listed = list_neighbours(mapped[:600], probes, lists, 64, exclusion=exclusion, candidate_budget=10**6)
    assert_same(listed, exact)
    sample = np.array([0, 77, 599])
    allowed = np.arange(5000)[None] != sample[:, None]
    expected = brute_force(keys[sample], keys, 64, allowed)
    np.testing.assert_array_equal(exact.ids_QK[sample], expected.ids_QK)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_float_keys_find_the_same_neighbours_in_float64(dtype):
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((400, 8)).astype(dtype)
    distances = ((keys[:50, None].astype(np.float64) - keys[None].astype(np.float64)) ** 2).sum(2)
    distances[np.arange(50), np.arange(50)] = np.inf
    exclusion = Exclusion(query_ids_Q=np.arange(50))
    _, offsets, list_ids = inverted_lists(400, 5)
    exact = exact_neighbours(
        torch.from_numpy(keys[:50]), torch.from_numpy(keys), 450, exclusion=exclusion, key_block=64
    )
    listed = list_neighbours(
        keys[:50],
        np.tile(np.arange(5), (50, 1)),
        in_list_order(keys, offsets, list_ids),
        450,
        exclusion=exclusion,
    )
    for found in (exact, listed):
        assert found.distances_QK.dtype == np.float64
        assert (found.ids_QK[:, 399:] == -1).all()
        assert (found.distances_QK[:, 399:] == np.finfo(np.float64).max).all()
        ids_QK, distances_QK = found.ids_QK[:, :399], found.distances_QK[:, :399]
        assert (np.diff(distances_QK) >= 0).all()
        np.testing.assert_array_equal(np.sort(ids_QK), [np.delete(np.arange(400), row) for row in range(50)])
        np.testing.assert_allclose(
            distances_QK, np.take_along_axis(distances, ids_QK, axis=1), rtol=1e-5, atol=1e-5
        )


def test_equal_float_keys_are_in_order_of_id():
    keys = np.zeros((40, 3), np.float32)
    found = exact_neighbours(keys[:2], keys, 10, exclusion=None, key_block=7)
    np.testing.assert_array_equal(found.ids_QK, np.tile(np.arange(10), (2, 1)))
    assert (found.distances_QK == 0).all()


def test_keys_that_are_not_finite_come_last():
    keys = np.zeros((6, 2), np.float32)
    keys[:, 0] = np.arange(6)
    keys[1], keys[3, 0] = np.nan, np.inf
    _, offsets, list_ids = inverted_lists(6, 3)
    for found in (
        exact_neighbours(keys[:1], keys, 6, exclusion=None),
        list_neighbours(
            keys[:1], np.arange(3)[None], in_list_order(keys, offsets, list_ids), 6, exclusion=None
        ),
    ):
        assert found.ids_QK[0, :4].tolist() == [0, 2, 4, 5]
        assert sorted(found.ids_QK[0, 4:].tolist()) == [1, 3]


def test_empty_inputs():
    none = exact_neighbours(codes_of(2, 4), codes_of(0, 4), 3, exclusion=None)
    assert (none.ids_QK == -1).all() and (none.distances_QK == MISSING).all()
    assert exact_neighbours(codes_of(0, 4), codes_of(9, 4), 3, exclusion=None).ids_QK.shape == (0, 3)


def test_mistakes_are_named_with_their_numbers():
    keys = codes_of(9, 4)
    _, offsets, list_ids = inverted_lists(9, 3)
    lists = in_list_order(keys, offsets, list_ids)
    with pytest.raises(ValueError, match="k is 0"):
        exact_neighbours(keys, keys, 0, exclusion=None)
    with pytest.raises(ValueError, match="queries have 3 dimensions, keys 4"):
        exact_neighbours(keys[:, :3], keys, 1, exclusion=None)
    with pytest.raises(ValueError, match="2 query ids for 9 queries"):
        exact_neighbours(keys, keys, 1, exclusion=Exclusion(query_ids_Q=np.arange(2)))
    with pytest.raises(ValueError, match="window is -1"):
        Exclusion(query_ids_Q=np.arange(9), window=-1)
    with pytest.raises(ValueError, match="give both or neither"):
        Exclusion(query_ids_Q=np.arange(9), stop_hidden_Q=np.zeros(9, int))
    with pytest.raises(ValueError, match="4 first_hidden_Q for 9 query ids"):
        Exclusion(query_ids_Q=np.arange(9), first_hidden_Q=np.zeros(4, int), stop_hidden_Q=np.zeros(9, int))
    with pytest.raises(ValueError, match="there are 3 lists"):
        list_neighbours(keys, np.full((9, 1), 3), lists, 1, exclusion=None)
    with pytest.raises(ValueError, match="probes one list twice"):
        list_neighbours(keys, np.zeros((9, 2), int), lists, 1, exclusion=None)
    with pytest.raises(ValueError, match="8 rows of probes for 9 queries"):
        list_neighbours(keys, np.zeros((8, 1), int), lists, 1, exclusion=None)
