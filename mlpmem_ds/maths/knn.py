"""Pipeline: keys and index → **nearest neighbours** → targets. Exact search over all the keys, and over the lists an index names.

With int8 codes a squared distance is an exact integer, so neighbours and distances do not depend on batches, threads or
devices, and ties are broken by id. Float keys take the same path through float32 and have no such promise.

A neighbour is *packed* in one int64, ``rank << id_bits | id``, where the rank is the integer distance or the bit pattern of
the non-negative float32 distance (which orders like the float). Packed values have no ties, so selecting the k least of
them gives one answer in whatever order they come.

Shape legend: Q queries, K keys at hand (or neighbours kept), N keys in all, D dimensions, P probes, L lists, S survivors,
M queries that probe one list, C capacity of a buffer.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = np.ndarray[Any, Any]

_MISSING = np.iinfo(np.int64).max
_NO_BOUND = np.iinfo(np.int32).max
_EXACT_DIMS_FLOAT32 = 1024  # 1024 * 128 * 128 = 2**24: below it every partial sum of int8 products is exact in float32
_MAX_DIMS = _NO_BOUND // 255**2
_FIRST_KEY_BLOCK = 2048


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Neighbours of each query, in the order (distance, id); those that are missing close the row.

    ``ids_QK`` int64, -1 where missing. ``distances_QK`` squared distances, int64 for int8 codes and float64 for float keys,
    the greatest value of the dtype where missing.
    """

    ids_QK: Array
    distances_QK: Array


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """What a query may not find: its own id; ids within ``window`` of it; keys of its own group (document), if groups are given.

    ``query_ids_Q``, ``query_groups_Q`` and ``key_groups_N`` are integers; key n has id n and group ``key_groups_N[n]``.
    """

    query_ids_Q: Array
    query_groups_Q: Array | None = None
    key_groups_N: Array | None = None
    window: int = 0

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"window is {self.window}; it counts positions on either side and must be 0 or more")
        if (self.query_groups_Q is None) != (self.key_groups_N is None):
            raise ValueError("query_groups_Q and key_groups_N go together: give both or neither")
        if self.query_groups_Q is not None and len(self.query_groups_Q) != len(self.query_ids_Q):
            raise ValueError(f"{len(self.query_groups_Q)} query groups for {len(self.query_ids_Q)} query ids")

    def covers(self, query_rows: Array, key_ids: Array) -> Array:
        """True where the key is hidden from the query; rows and ids broadcast against each other."""
        hidden: Array = np.abs(key_ids - self.query_ids_Q[query_rows]) <= self.window
        if self.query_groups_Q is not None and self.key_groups_N is not None:
            hidden |= self.key_groups_N[key_ids] == self.query_groups_Q[query_rows]
        return hidden


def squared_distances(queries_QD: Tensor, keys_KD: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Squared Euclidean distances [Q, K]: int32 and exact for two int8 tensors, else float32, at least 0, not bit-exact.

    ``out`` (int32 [Q, K], contiguous) may receive the integers: page faults of a fresh result cost as much as the product.
    Raises ValueError when an exact distance could pass int32 (more than 33,025 dimensions).
    """
    if queries_QD.shape[1] != keys_KD.shape[1]:
        raise ValueError(f"queries have {queries_QD.shape[1]} dimensions, keys {keys_KD.shape[1]}")
    if not _are_codes(queries_QD, keys_KD):
        queries_QD, keys_KD = queries_QD.float(), keys_KD.float()
        distances_QK = torch.addmm(keys_KD.square().sum(1), queries_QD, keys_KD.t(), alpha=-2)
        return distances_QK.add_(queries_QD.square().sum(1, keepdim=True)).clamp_(min=0)
    if queries_QD.shape[1] > _MAX_DIMS:
        raise ValueError(f"int8 codes of {queries_QD.shape[1]} dimensions overflow int32; use at most {_MAX_DIMS}")
    products_QK = _integer_products(queries_QD, keys_KD, out)
    torch.sub(_squared_norms(keys_KD), products_QK, alpha=2, out=products_QK)
    return products_QK.add_(_squared_norms(queries_QD)[:, None])


def exact_neighbours(
    queries_QD: Array | Tensor,
    keys_ND: Array | Tensor,
    k: int,
    *,
    exclusion: Exclusion | None,
    query_block: int = 1024,
    key_block: int = 8192,
) -> Neighbours:
    """The k nearest of all the keys for each query; key n has id n.

    ``keys_ND`` may be a memory map: one block of it is in memory at a time. The blocks bound the memory (about
    ``query_block * key_block * 13`` bytes) and change nothing in the result for int8 codes.
    """
    num_keys, num_dims = keys_ND.shape
    is_integer = _are_codes(queries_QD, keys_ND)
    id_bits = _check_search(queries_QD, num_dims, num_keys, k, exclusion, is_integer)
    blocks = list(_growing_blocks(num_keys, key_block))
    scratch = torch.empty(query_block * key_block, dtype=torch.int32)
    packed_QK = np.empty((len(queries_QD), k), np.int64)
    for query_start in range(0, len(queries_QD), query_block):
        block_QD = _tensor(queries_QD[query_start : query_start + query_block])
        best = _RunningBest(len(block_QD), k, capacity=k + key_block)
        for start, stop in blocks:
            ranks_QK = _ranks(block_QD, _tensor(keys_ND[start:stop]), scratch)
            rows_S, columns_S, ranks_S = _below(ranks_QK, best.ranks_bound_Q(id_bits))
            ids_S = columns_S + start
            if exclusion is not None:
                keep_S = ~exclusion.covers(rows_S + query_start, ids_S)
                rows_S, ids_S, ranks_S = rows_S[keep_S], ids_S[keep_S], ranks_S[keep_S]
            best.add(rows_S, (ranks_S.astype(np.int64) << id_bits) | ids_S)
        packed_QK[query_start : query_start + query_block] = best.sorted()
    return _unpack(packed_QK, id_bits, is_integer)


def list_neighbours(
    queries_QD: Array | Tensor,
    probes_QP: Array,
    list_offsets_L1: Array,
    list_ids_N: Array,
    codes: Any,
    k: int,
    *,
    exclusion: Exclusion | None,
    candidate_budget: int = 2**25,
) -> Neighbours:
    """The k nearest for each query among the keys of the lists it probes (inverted file, list by list).

    ``probes_QP`` int64 list numbers, each at most once in a row, -1 = none; list l holds the ids
    ``list_ids_N[list_offsets_L1[l]:list_offsets_L1[l + 1]]``, and ``codes`` [num_keys, D] is indexed by an array of ids.
    Queries are taken in blocks of at most ``candidate_budget`` (query, key) pairs (8 bytes each), or one query if it
    has more; within a block each probed list is read once and multiplied with all the queries that probe it.
    With every list probed the result is that of `exact_neighbours`, bit for bit for int8 codes.
    """
    num_keys, num_dims = codes.shape
    is_integer = _are_codes(queries_QD, codes)
    id_bits = _check_search(queries_QD, num_dims, num_keys, k, exclusion, is_integer)
    _check_probes(probes_QP, len(queries_QD), len(list_offsets_L1) - 1)
    sizes_QP = np.where(probes_QP >= 0, np.diff(list_offsets_L1, append=0)[probes_QP], 0)
    packed_QK = np.full((len(queries_QD), k), _MISSING, np.int64)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start, stop in _budget_blocks(sizes_QP.sum(1), candidate_budget):
            candidates, starts_BP = (
                np.empty(int(sizes_QP[start:stop].sum()), np.int64),
                np.zeros_like(sizes_QP[start:stop]),
            )
            for list_number, pairs_M, first in _probed_lists(probes_QP[start:stop], sizes_QP[start:stop], starts_BP):
                ids_K = list_ids_N[list_offsets_L1[list_number] : list_offsets_L1[list_number + 1]].astype(np.int64)
                rows_M = start + pairs_M // probes_QP.shape[1]
                tile_MK = candidates[first : first + len(rows_M) * len(ids_K)].reshape(len(rows_M), len(ids_K))
                ranks_MK = _ranks(_tensor(queries_QD[rows_M]), _tensor(codes[ids_K]), None)
                torch.from_numpy(tile_MK).copy_(ranks_MK).mul_(1 << id_bits).add_(torch.from_numpy(ids_K))
                if exclusion is not None:
                    tile_MK[exclusion.covers(rows_M[:, None], ids_K[None])] = _MISSING
            _select(candidates, starts_BP, sizes_QP[start:stop], packed_QK[start:stop], pool)
    return _unpack(packed_QK, id_bits, is_integer)


class _RunningBest:
    """The k least packed values of each row, kept while candidates arrive in ascending order of id."""

    def __init__(self, num_rows: int, k: int, *, capacity: int) -> None:
        self.k = k
        self.packed_QC = np.empty((num_rows, capacity), np.int64)
        self.packed_QC[:, :k] = _MISSING
        self.filled_Q = np.zeros(num_rows, np.int64)

    def ranks_bound_Q(self, id_bits: int) -> Tensor:
        """A key that comes now must have a rank below this (int32) to enter; an equal rank loses by its id."""
        return torch.from_numpy(np.minimum(self.packed_QC[:, self.k - 1] >> id_bits, _NO_BOUND).astype(np.int32))

    def add(self, rows_S: Array, packed_S: Array) -> None:
        """Take candidates, at most the capacity less k in one row; ``rows_S`` ascends."""
        num_rows, capacity = self.packed_QC.shape
        counts_Q = np.bincount(rows_S, minlength=num_rows)
        offsets_Q = np.arange(num_rows) * capacity + self.filled_Q - (np.cumsum(counts_Q) - counts_Q)
        self.packed_QC.ravel()[offsets_Q[rows_S] + np.arange(len(rows_S))] = packed_S
        self.filled_Q += counts_Q
        width = max(self.k, int(self.filled_Q.max(initial=0)))
        used_QC = self.packed_QC[:, :width]
        used_QC[np.arange(width) >= self.filled_Q[:, None]] = _MISSING
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


def _ranks(queries_QD: Tensor, keys_KD: Tensor, scratch: Tensor | None) -> Tensor:
    """int32 [Q, K] that orders like the distances."""
    if not _are_codes(queries_QD, keys_KD):
        return squared_distances(queries_QD, keys_KD).abs_().view(torch.int32)  # abs: inf - inf has the sign bit
    if scratch is not None:
        scratch = scratch[: len(queries_QD) * len(keys_KD)].view(len(queries_QD), len(keys_KD))
    return squared_distances(queries_QD, keys_KD, out=scratch)


def _integer_products(queries_QD: Tensor, keys_KD: Tensor, out: Tensor | None) -> Tensor:
    size = (len(queries_QD), len(keys_KD))
    products_QK = torch.empty(size, dtype=torch.int32, device=keys_KD.device) if out is None else out
    if _may_use_integer_matmul(queries_QD, keys_KD):
        return torch._int_mm(queries_QD.contiguous(), keys_KD.contiguous().t(), out=products_QK)
    products_QK.zero_()
    for start in range(0, queries_QD.shape[1], _EXACT_DIMS_FLOAT32):
        dims = slice(start, start + _EXACT_DIMS_FLOAT32)
        products_QK += (queries_QD[:, dims].float() @ keys_KD[:, dims].float().t()).to(torch.int32)
    return products_QK


def _may_use_integer_matmul(queries_QD: Tensor, keys_KD: Tensor) -> bool:
    """Is `torch._int_mm` exact here? On CUDA it refuses some shapes; on CPU one dimension gives noise (torch 2.13)."""
    num_dims = queries_QD.shape[1]
    if queries_QD.device.type == "cpu":
        return num_dims > 1 and _cpu_integer_matmul_is_exact()
    shape_fits = len(queries_QD) > 16 and num_dims % 8 == 0 and len(keys_KD) % 8 == 0
    return queries_QD.device.type == "cuda" and shape_fits


@cache
def _cpu_integer_matmul_is_exact() -> bool:
    """x86 before VNNI adds pairs of products in saturating int16: 127 * 127 comes out wrong (try ONEDNN_MAX_CPU_ISA=AVX2)."""
    codes = torch.full((64, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(codes, codes.t()) == 64 * 127 * 127).all())


def _squared_norms(codes_ND: Tensor) -> Tensor:
    wide_ND = codes_ND.to(torch.int32)
    return wide_ND.mul_(wide_ND).sum(
        1, dtype=torch.int32
    )  # square_() of int32 took ten times as long (torch 2.13, CPU)


def _are_codes(*arrays: Any) -> bool:
    return all(array.dtype in (np.dtype(np.int8), torch.int8) for array in arrays)


def _tensor(array: Any) -> Tensor:
    """A CPU tensor of an array; read-only arrays (memory maps) are copied."""
    if isinstance(array, Tensor):
        return array.cpu()
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _growing_blocks(num_keys: int, key_block: int) -> Iterator[tuple[int, int]]:
    """[start, stop) over the keys: small at first, where every key enters for want of a bound, doubling to ``key_block``."""
    start, size = 0, min(_FIRST_KEY_BLOCK, key_block)
    while start < num_keys:
        stop = min(start + size, num_keys)
        yield start, stop
        start, size = stop, min(2 * size, key_block)


def _budget_blocks(costs_Q: Array, budget: int) -> Iterator[tuple[int, int]]:
    """[start, stop) over the queries: as many as fit in the budget, at least one."""
    total_Q = np.cumsum(costs_Q)
    start = 0
    while start < len(costs_Q):
        before = int(total_Q[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(total_Q, before + budget, side="right")))
        yield start, stop
        start = stop


def _probed_lists(probes_QP: Array, sizes_QP: Array, starts_QP: Array) -> Iterator[tuple[int, Array, int]]:
    """Each list that is probed and not empty: its number, the flat places in ``probes_QP`` that name it, its first candidate.

    Candidates are laid out list by list, then query by query; ``starts_QP`` receives where those of each probe start.
    """
    probes, sizes = probes_QP.ravel(), sizes_QP.ravel()
    order = np.argsort(probes, kind="stable")
    order = order[sizes[order] > 0]
    starts = np.cumsum(sizes[order]) - sizes[order]
    starts_QP.ravel()[order] = starts
    firsts = np.flatnonzero(np.diff(probes[order], prepend=-1))
    for first, stop in zip(firsts, [*firsts[1:], len(order)], strict=False):
        yield int(probes[order[first]]), order[first:stop], int(starts[first])


def _unpack(packed_QK: Array, id_bits: int, is_integer: bool) -> Neighbours:
    missing_QK = packed_QK == _MISSING
    ids_QK = np.where(missing_QK, -1, packed_QK & ((1 << id_bits) - 1))
    ranks_QK = packed_QK >> id_bits
    if is_integer:
        return Neighbours(ids_QK=ids_QK, distances_QK=np.where(missing_QK, _MISSING, ranks_QK))
    distances_QK = ranks_QK.astype(np.int32).view(np.float32).astype(np.float64)
    return Neighbours(ids_QK=ids_QK, distances_QK=np.where(missing_QK, np.finfo(np.float64).max, distances_QK))


def _check_search(
    queries_QD: Array | Tensor, num_dims: int, num_keys: int, k: int, exclusion: Exclusion | None, is_integer: bool
) -> int:
    """Refuse what cannot be searched; return how many bits of a packed value hold the id."""
    if k < 1:
        raise ValueError(f"k is {k}; ask for at least 1 neighbour")
    if queries_QD.shape[1] != num_dims:
        raise ValueError(f"queries have {queries_QD.shape[1]} dimensions, keys {num_dims}")
    if exclusion is not None and len(exclusion.query_ids_Q) != len(queries_QD):
        raise ValueError(f"exclusion names {len(exclusion.query_ids_Q)} query ids for {len(queries_QD)} queries")
    if exclusion is not None and exclusion.key_groups_N is not None and len(exclusion.key_groups_N) != num_keys:
        raise ValueError(f"exclusion has {len(exclusion.key_groups_N)} key groups for {num_keys} keys")
    id_bits = 63 - ((num_dims * 255**2).bit_length() if is_integer else 31)
    if num_keys >= 2**id_bits:
        raise ValueError(f"{num_keys} keys of {num_dims} dimensions; at most {2**id_bits - 1} ids can be told apart")
    return id_bits


def _check_probes(probes_QP: Array, num_queries: int, num_lists: int) -> None:
    if len(probes_QP) != num_queries:
        raise ValueError(f"{len(probes_QP)} rows of probes for {num_queries} queries")
    if probes_QP.size and (probes_QP.max() >= num_lists or probes_QP.min() < -1):
        raise ValueError(
            f"probes lie in [{probes_QP.min()}, {probes_QP.max()}]; there are {num_lists} lists, and -1 is none"
        )
    sorted_QP = np.sort(probes_QP, axis=1)
    if ((sorted_QP[:, 1:] == sorted_QP[:, :-1]) & (sorted_QP[:, 1:] >= 0)).any():
        raise ValueError(
            "a query probes one list twice, which would give it the same neighbour twice; drop repeated probes"
        )
