"""Pipeline: keys and index → **nearest neighbours** → targets. Exact search over all the keys, and over the lists an index names.

With int8 codes a squared distance is an exact integer, so neighbours and distances do not depend on batches, threads or
devices, and ties are broken by id. Float keys take the same path through float32 and have no such promise. Where CUDA is at
hand the search runs there (knn_on_device.py).

Shape legend: Q queries, K keys at hand (or neighbours kept), N keys in all, D dimensions, P probes, L lists, S survivors,
M queries that probe one list, C capacity of a buffer.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mlpmem_ds.maths.distances import are_codes, distance_ranks
from mlpmem_ds.maths.knn_on_device import exact_neighbours_on_device, list_neighbours_on_device
from mlpmem_ds.maths.neighbours import MISSING, NO_BOUND, Exclusion, Neighbours, check_probes, check_search, unpack
from mlpmem_ds.maths.search_blocks import budget_blocks, growing_blocks, probed_lists

__all__ = [
    "Exclusion",
    "Neighbours",
    "exact_neighbours",
    "list_neighbours",
    "most_keys_for_exact",
    "search_device",
]

Array: TypeAlias = np.ndarray[Any, Any]

_MOST_KEYS_FOR_EXACT = {
    "cpu": 200_000,
    "cuda": 10_000_000,
}  # minutes on two cores or one GPU; above, lists are worth it


def search_device() -> torch.device:
    """Where a search runs unless it is told: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def most_keys_for_exact(device: torch.device | str | None = None) -> int:
    """Up to how many keys exact search is the right choice on this device (None: `search_device`)."""
    return _MOST_KEYS_FOR_EXACT[_device(device).type]


def _device(device: torch.device | str | None) -> torch.device:
    return search_device() if device is None else torch.device(device)


def exact_neighbours(
    queries_QD: Array | Tensor,
    keys_ND: Array | Tensor,
    k: int,
    *,
    exclusion: Exclusion | None,
    query_block: int = 1024,
    key_block: int = 8192,
    device: torch.device | str | None = None,
) -> Neighbours:
    """The k nearest of all the keys for each query; key n has id n.

    ``keys_ND`` may be a memory map: one block of it is in memory at a time. The blocks bound the memory of a CPU (about
    ``query_block * key_block * 13`` bytes) and change nothing in the result for int8 codes, nor does the device (None:
    `search_device`).
    """
    if _device(device).type != "cpu":
        return exact_neighbours_on_device(queries_QD, keys_ND, k, exclusion=exclusion, device=_device(device))
    num_keys, num_dims = keys_ND.shape
    is_integer = are_codes(queries_QD, keys_ND)
    id_bits = check_search(queries_QD, num_dims, num_keys, k, exclusion, is_integer)
    blocks = list(growing_blocks(num_keys, key_block))
    scratch = torch.empty(query_block * key_block, dtype=torch.int32)
    packed_QK = np.empty((len(queries_QD), k), np.int64)
    for query_start in range(0, len(queries_QD), query_block):
        block_QD = _tensor(queries_QD[query_start : query_start + query_block])
        best = _RunningBest(len(block_QD), k, capacity=k + key_block)
        for start, stop in blocks:
            ranks_QK = distance_ranks(block_QD, _tensor(keys_ND[start:stop]), scratch)
            rows_S, columns_S, ranks_S = _below(ranks_QK, best.ranks_bound_Q(id_bits))
            ids_S = columns_S + start
            if exclusion is not None:
                keep_S = ~exclusion.covers(rows_S + query_start, ids_S)
                rows_S, ids_S, ranks_S = rows_S[keep_S], ids_S[keep_S], ranks_S[keep_S]
            best.add(rows_S, (ranks_S.astype(np.int64) << id_bits) | ids_S)
        packed_QK[query_start : query_start + query_block] = best.sorted()
    return unpack(packed_QK, id_bits, is_integer)


def list_neighbours(
    queries_QD: Array | Tensor,
    probes_QP: Array,
    list_offsets_L1: Array,
    list_ids_N: Array,
    codes: Any,
    k: int,
    *,
    exclusion: Exclusion | None,
    candidate_budget: int = 2**24,
    device: torch.device | str | None = None,
    key_norms_N: Array | None = None,
) -> Neighbours:
    """The k nearest for each query among the keys of the lists it probes (inverted file, list by list).

    ``probes_QP`` int64 list numbers, each at most once in a row, -1 = none; list l holds the ids
    ``list_ids_N[list_offsets_L1[l]:list_offsets_L1[l + 1]]``, and ``codes`` [num_keys, D] is indexed by an array of ids.
    Queries are taken in blocks of at most ``candidate_budget`` (query, key) pairs (8 bytes each), or one query if it
    has more; within a block each probed list is read once and multiplied with all the queries that probe it.
    With every list probed the result is that of `exact_neighbours`, bit for bit for int8 codes. ``key_norms_N``, the
    `squared_norms` of int8 codes, saves a CPU from computing them anew for each block (two thirds of the work outside the
    products); it changes nothing else.
    """
    if _device(device).type != "cpu":
        return list_neighbours_on_device(
            queries_QD,
            probes_QP,
            list_offsets_L1,
            list_ids_N,
            codes,
            k,
            exclusion=exclusion,
            candidate_budget=candidate_budget,
            device=_device(device),
        )
    num_keys, num_dims = codes.shape
    is_integer = are_codes(queries_QD, codes)
    id_bits = check_search(queries_QD, num_dims, num_keys, k, exclusion, is_integer)
    check_probes(probes_QP, len(queries_QD), len(list_offsets_L1) - 1)
    sizes_QP = np.where(probes_QP >= 0, np.diff(list_offsets_L1, append=0)[probes_QP], 0)
    packed_QK = np.full((len(queries_QD), k), MISSING, np.int64)
    blocks = list(budget_blocks(sizes_QP.sum(1), candidate_budget))
    # One buffer for all blocks: page faults of a fresh one cost a third of the search.
    buffer = np.empty(max((int(sizes_QP[start:stop].sum()) for start, stop in blocks), default=0), np.int64)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start, stop in blocks:
            candidates, starts_BP = buffer[: int(sizes_QP[start:stop].sum())], np.zeros_like(sizes_QP[start:stop])
            for list_number, pairs_M, first in probed_lists(probes_QP[start:stop], sizes_QP[start:stop], starts_BP):
                ids_K = list_ids_N[list_offsets_L1[list_number] : list_offsets_L1[list_number + 1]].astype(np.int64)
                rows_M = start + pairs_M // probes_QP.shape[1]
                tile_MK = candidates[first : first + len(rows_M) * len(ids_K)].reshape(len(rows_M), len(ids_K))
                norms_K = None if key_norms_N is None else torch.from_numpy(key_norms_N[ids_K])
                ranks_MK = distance_ranks(_tensor(queries_QD[rows_M]), _tensor(codes[ids_K]), None, norms_K)
                torch.from_numpy(tile_MK).copy_(ranks_MK).mul_(1 << id_bits).add_(torch.from_numpy(ids_K))
                if exclusion is not None:
                    exclusion.hide(tile_MK, rows_M, ids_K)
            _select(candidates, starts_BP, sizes_QP[start:stop], packed_QK[start:stop], pool)
    return unpack(packed_QK, id_bits, is_integer)


class _RunningBest:
    """The k least packed values of each row, kept while candidates arrive in ascending order of id."""

    def __init__(self, num_rows: int, k: int, *, capacity: int) -> None:
        self.k = k
        self.packed_QC = np.empty((num_rows, capacity), np.int64)
        self.packed_QC[:, :k] = MISSING
        self.filled_Q = np.zeros(num_rows, np.int64)

    def ranks_bound_Q(self, id_bits: int) -> Tensor:
        """A key that comes now must have a rank below this (int32) to enter; an equal rank loses by its id."""
        return torch.from_numpy(np.minimum(self.packed_QC[:, self.k - 1] >> id_bits, NO_BOUND).astype(np.int32))

    def add(self, rows_S: Array, packed_S: Array) -> None:
        """Take candidates, at most the capacity less k in one row; ``rows_S`` ascends."""
        num_rows, capacity = self.packed_QC.shape
        counts_Q = np.bincount(rows_S, minlength=num_rows)
        offsets_Q = np.arange(num_rows) * capacity + self.filled_Q - (np.cumsum(counts_Q) - counts_Q)
        self.packed_QC.ravel()[offsets_Q[rows_S] + np.arange(len(rows_S))] = packed_S
        self.filled_Q += counts_Q
        width = max(self.k, int(self.filled_Q.max(initial=0)))
        used_QC = self.packed_QC[:, :width]
        used_QC[np.arange(width) >= self.filled_Q[:, None]] = MISSING
        used_QC.partition(self.k - 1, axis=1)
        self.filled_Q = np.minimum(self.filled_Q, self.k)

    def sorted(self) -> Array:
        return np.sort(self.packed_QC[:, : self.k], axis=1)


def _below(ranks_QK: Tensor, bound_Q: Tensor) -> tuple[Array, Array, Array]:
    """Rows, columns and ranks of the elements below their row's bound, row by row."""
    below_QK = (ranks_QK < bound_Q[:, None]).numpy()
    flat_S = np.flatnonzero(below_QK)
    rows_S = np.repeat(np.arange(len(below_QK)), np.count_nonzero(below_QK, axis=1))
    return rows_S, flat_S - rows_S * below_QK.shape[1], ranks_QK.numpy().ravel()[flat_S]


def _select(candidates: Array, starts_QP: Array, sizes_QP: Array, packed_QK: Array, pool: ThreadPoolExecutor) -> None:
    """Fill each row with its least candidates in order; a row's candidates lie in P pieces, one a probed list."""
    k = packed_QK.shape[1]

    def select_rows(rows: range) -> None:
        for row in rows:
            pieces = zip(starts_QP[row].tolist(), sizes_QP[row].tolist(), strict=True)
            found = np.concatenate([candidates[start : start + size] for start, size in pieces])
            if len(found) > k:
                found.partition(k - 1)
                found = found[:k]
            found.sort()
            packed_QK[row, : len(found)] = found

    step = 256
    list(pool.map(select_rows, (range(s, min(s + step, len(packed_QK))) for s in range(0, len(packed_QK), step))))


def _tensor(array: Any) -> Tensor:
    """A CPU tensor of an array; read-only arrays (memory maps) are copied."""
    if isinstance(array, Tensor):
        return array.cpu()
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
