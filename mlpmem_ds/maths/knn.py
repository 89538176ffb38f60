"""Pipeline: keys and index → **nearest neighbours** → targets. Exact search over all the keys, and over the
lists an index names.

With int8 codes a squared distance is an exact integer, so neighbours and distances do not depend on batches,
threads or devices, and ties are broken by id. Float keys take the same path through float32 and have no such
promise. On a GPU the search is that of knn_on_device.py.

Shape legend: Q queries, K keys of a block (or neighbours kept), N keys in all, D dimensions, P probes, L
lists, S survivors, F queries that have k neighbours, M queries that probe one list, B queries of a block,
T their probes of lists that are not empty, C capacity of a buffer.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mlpmem_ds.maths.candidates import CandidateBlock
from mlpmem_ds.maths.distances import CPU, are_codes, distance_ranks, norms_of_codes, ranks_in_list
from mlpmem_ds.maths.knn_on_device import DeviceKeys, HostKeys, exact_neighbours_on_device, load_keys
from mlpmem_ds.maths.listed_keys import ListedKeys, view_of
from mlpmem_ds.maths.lists_on_device import list_neighbours_on_device
from mlpmem_ds.maths.neighbours import (
    MISSING,
    NO_BOUND,
    Exclusion,
    Neighbours,
    PackedNeighbours,
    check_search,
)
from mlpmem_ds.maths.search_blocks import budget_blocks, growing_blocks, order_of_probes, probed_lists

__all__ = [
    "Exclusion",
    "Neighbours",
    "PackedNeighbours",
    "exact_neighbours",
    "list_neighbours",
    "pack_exact_neighbours",
    "pack_list_neighbours",
]

Array: TypeAlias = np.ndarray[Any, Any]
_Arguments = ParamSpec("_Arguments")

QUERY_BLOCK, KEY_BLOCK = 512, 8192
"""queries and keys that exact search on a CPU compares at once"""


def pack_exact_neighbours(
    queries_QD: Array | Tensor,
    keys_ND: Any,
    k: int,
    *,
    exclusion: Exclusion | None,
    query_block: int = QUERY_BLOCK,
    key_block: int = KEY_BLOCK,
    device: torch.device = CPU,
) -> PackedNeighbours:
    """The k nearest of all the keys for each query; key n has id n.

    ``keys_ND`` is an array, a tensor, or what has their `shape`, `dtype`, `nbytes` and slices (a memory map,
    rows of files): one block of it is in memory at a time. For many searches on a GPU it is what `load_keys`
    gives, or all keys would be copied at each. The blocks bound the memory of a CPU (about
    ``query_block * key_block * 13`` bytes) and change nothing in the result for int8 codes, nor does the
    device.
    """
    if device.type != "cpu" and not isinstance(keys_ND, DeviceKeys | HostKeys):
        keys_ND = load_keys(keys_ND, device)
    if isinstance(keys_ND, DeviceKeys | HostKeys):
        return exact_neighbours_on_device(queries_QD, keys_ND, k, exclusion=exclusion)
    num_keys, num_dims = keys_ND.shape
    is_integer = are_codes(queries_QD, keys_ND)
    id_bits = check_search(queries_QD, num_dims, num_keys, k, exclusion, is_integer)
    blocks = list(growing_blocks(num_keys, key_block))
    scratch = torch.empty(query_block * key_block, dtype=torch.int32)
    is_below = torch.empty(query_block * key_block, dtype=torch.bool)
    packed_QK = np.empty((len(queries_QD), k), np.int64)
    for query_start in range(0, len(queries_QD), query_block):
        block_QD = _tensor(queries_QD[query_start : query_start + query_block])
        best = _RunningBest(len(block_QD), k, capacity=k + key_block)
        for start, stop in blocks:
            ranks_QK = distance_ranks(block_QD, _tensor(keys_ND[start:stop]), scratch)
            rows_S, columns_S, ranks_S = _below(ranks_QK, best.ranks_bound_Q(id_bits), is_below)
            ids_S = columns_S + start
            if exclusion is not None:
                keep_S = ~exclusion.covers(rows_S + query_start, ids_S)
                rows_S, ids_S, ranks_S = rows_S[keep_S], ids_S[keep_S], ranks_S[keep_S]
            best.add(rows_S, (ranks_S.astype(np.int64) << id_bits) | ids_S)
        packed_QK[query_start : query_start + query_block] = best.sorted()
    return PackedNeighbours(packed_QK=packed_QK, id_bits=id_bits, is_integer=is_integer)


def pack_list_neighbours(
    queries_QD: Array | Tensor,
    probes_QP: Array,
    lists: ListedKeys,
    k: int,
    *,
    exclusion: Exclusion | None,
    candidate_budget: int = 2**24,
    device: torch.device = CPU,
) -> PackedNeighbours:
    """The k nearest for each query among the keys of the lists it probes (inverted file, list by list).

    ``probes_QP`` int64 list numbers, nearest first, each at most once in a row, -1 = none. Where ``lists``
    are a group of an index's lists, probes of the others find nothing.
    On a CPU queries are taken in the order of their first list, in blocks of at most ``candidate_budget``
    (query, key) pairs (4 bytes each), or one query if it has more; within a block each probed list is read
    once and multiplied with all the queries that probe it. With every list probed the result is that of
    `exact_neighbours`, bit for bit for int8 codes.
    """
    if device.type != "cpu":
        return list_neighbours_on_device(
            queries_QD,
            probes_QP,
            lists,
            k,
            exclusion=exclusion,
            device=device,
        )
    is_integer = are_codes(queries_QD, lists)
    id_bits = check_search(queries_QD, lists.num_dims, lists.num_keys, k, exclusion, is_integer)
    probes_QP = lists.local_probes(probes_QP, len(queries_QD))
    queries, sizes_QP = _tensor(queries_QD), lists.sizes_of(probes_QP)
    # What ranks_in_list leaves out of the distances of each query.
    offsets_Q = (
        norms_of_codes(queries).astype(np.int64) << id_bits
        if is_integer
        else np.zeros(len(queries), np.int64)
    )
    own_ids_Q = exclusion.query_ids_Q if exclusion is not None and exclusion.is_self_alone else None
    packed_QK = np.empty((len(queries), k), np.int64)
    order_Q = order_of_probes(probes_QP)
    blocks = [order_Q[slice(*block)] for block in budget_blocks(sizes_QP[order_Q].sum(1), candidate_budget)]
    # One buffer for all blocks: page faults of a fresh one cost a third of the search. Its last number pads
    # short rows.
    buffer = torch.empty(
        1 + max((int(sizes_QP[rows_B].sum()) for rows_B in blocks), default=0), dtype=torch.int32
    )
    buffer[-1] = NO_BOUND
    with _spread(torch.get_num_threads()) as spread:
        for rows_B in blocks:
            block = _measured_block(
                rows_B,
                queries,
                probes_QP,
                sizes_QP,
                lists,
                exclusion=None if own_ids_Q is not None else exclusion,
                own_ids_Q=own_ids_Q,
                offsets_Q=offsets_Q,
                buffer=buffer,
            )

            def select(rows: range, rows_B: Array = rows_B, block: CandidateBlock = block) -> None:
                packed_QK[rows_B[rows.start : rows.stop]] = block.nearest(rows, k, id_bits)

            list(spread(select, block.split_rows()))
    return PackedNeighbours(packed_QK=packed_QK, id_bits=id_bits, is_integer=is_integer)


def _measured_block(
    rows_B: Array,
    queries: Tensor,
    probes_QP: Array,
    sizes_QP: Array,
    lists: ListedKeys,
    *,
    exclusion: Exclusion | None,
    own_ids_Q: Array | None,
    offsets_Q: Array,
    buffer: Tensor,
) -> CandidateBlock:
    """The ranks (int32, into ``buffer``) of all keys of the lists that these queries probe; each list is read
    once.

    ``exclusion`` is applied to the ranks; ``own_ids_Q`` is left to the selection, for queries that exclude
    only themselves.
    """
    probes_BP, sizes_BP = probes_QP[rows_B], sizes_QP[rows_B]
    starts_BP, firsts_BP = np.zeros_like(sizes_BP), np.zeros_like(sizes_BP)
    order, probed = probed_lists(probes_BP, sizes_BP, starts_BP)
    rows_T = rows_B[order // probes_QP.shape[1]]
    queries_TD = queries[torch.from_numpy(rows_T)]  # those of one list side by side
    ids = [lists.ids_of(number) for number, *_ in probed]
    for (number, start, stop, first), ids_K in zip(probed, ids, strict=True):
        tile_MK = buffer[first : first + (stop - start) * len(ids_K)].view(stop - start, len(ids_K))
        ranks_in_list(queries_TD[start:stop], *lists.keys_of(number), out=tile_MK)
        if exclusion is not None:
            tile_MK.numpy()[exclusion.covers(rows_T[start:stop, None], ids_K[None])] = NO_BOUND
    num_ids = np.array([len(ids_K) for ids_K in ids], np.int64)
    probes_of_list = [stop - start for _, start, stop, _ in probed]
    firsts_BP.ravel()[order] = np.repeat(np.cumsum(num_ids) - num_ids, probes_of_list)
    return CandidateBlock(
        ranks=buffer.numpy(),
        starts_BP=starts_BP,
        sizes_BP=sizes_BP,
        ids=np.concatenate([np.empty(0, np.int64), *ids]),
        first_ids_BP=firsts_BP,
        offsets_B=offsets_Q[rows_B],
        own_ids_B=None if own_ids_Q is None else own_ids_Q[rows_B],
    )


def _unpacked(search: Callable[_Arguments, PackedNeighbours]) -> Callable[_Arguments, Neighbours]:
    @functools.wraps(search)
    def found(*args: _Arguments.args, **options: _Arguments.kwargs) -> Neighbours:
        return search(*args, **options).unpack()

    return found


exact_neighbours = _unpacked(pack_exact_neighbours)
list_neighbours = _unpacked(pack_list_neighbours)


class _RunningBest:
    """The k least packed values of each row, kept while candidates arrive in ascending order of id."""

    def __init__(self, num_rows: int, k: int, *, capacity: int) -> None:
        self.k = k
        self.packed_QC = np.empty((num_rows, capacity), np.int64)
        self.packed_QC[:, :k] = MISSING
        self.filled_Q = np.zeros(num_rows, np.int64)

    def ranks_bound_Q(self, id_bits: int) -> Tensor:
        """A key that comes now must have a rank below this (int32) to enter; an equal rank loses by its
        id."""
        return torch.from_numpy(
            np.minimum(self.packed_QC[:, self.k - 1] >> id_bits, NO_BOUND).astype(np.int32)
        )

    def add(self, rows_S: Array, packed_S: Array) -> None:
        """Take candidates, at most the capacity less k in one row; ``rows_S`` ascends."""
        num_rows, capacity = self.packed_QC.shape
        counts_Q = np.bincount(rows_S, minlength=num_rows)
        offsets_Q = np.arange(num_rows) * capacity + self.filled_Q - (np.cumsum(counts_Q) - counts_Q)
        self.packed_QC.ravel()[offsets_Q[rows_S] + np.arange(len(rows_S))] = packed_S
        self.filled_Q += counts_Q
        # Rows that are not full have nothing to drop, and their bound is MISSING. So they are not touched: a
        # selection takes the time of k keys, and would mix what they hold with what is missing.
        full_F = np.flatnonzero(self.filled_Q >= self.k)
        if not len(full_F):
            return
        are_all, width = len(full_F) == num_rows, int(self.filled_Q.max())
        used_FC = self.packed_QC[:, :width] if are_all else self.packed_QC[full_F, :width]
        used_FC[np.arange(width) >= self.filled_Q[full_F, None]] = MISSING
        used_FC.partition(self.k - 1, axis=1)
        if not are_all:
            self.packed_QC[full_F, :width] = used_FC
        self.filled_Q[full_F] = self.k

    def sorted(self) -> Array:
        return np.sort(self.packed_QC[:, : self.k], axis=1)


def _below(ranks_QK: Tensor, bound_Q: Tensor, scratch: Tensor) -> tuple[Array, Array, Array]:
    """Rows, columns and ranks of the elements below their row's bound, row by row; ``scratch`` bool, at least
    as many."""
    below_QK = torch.lt(ranks_QK, bound_Q[:, None], out=scratch[: ranks_QK.numel()].view(ranks_QK.shape))
    flat_S = np.flatnonzero(below_QK.numpy())
    rows_S, columns_S = np.divmod(flat_S, ranks_QK.shape[1])
    return rows_S, columns_S, ranks_QK.numpy().ravel()[flat_S]


@contextlib.contextmanager
def _spread(num_threads: int) -> Iterator[Any]:
    """`map` over this many threads."""
    if num_threads == 1:
        yield map
        return
    with ThreadPoolExecutor(num_threads) as pool:
        yield pool.map


def _tensor(array: Any) -> Tensor:
    """A CPU tensor of an array, over its own memory if that is in one piece; nothing here writes to it."""
    return array.cpu() if isinstance(array, Tensor) else view_of(np.ascontiguousarray(array))
