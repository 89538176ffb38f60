"""List search by ranks that were launched together: each owns a group of lists and searches it for all.

A call goes as follows, and every rank takes part in each:

    each rank   its queries ─▶ the lists that they probe ─▶ each query to the owners of these lists
    owner       all queries that it got × the keys of its group ─▶ the k nearest of each in its group
    each rank   the answers of the owners ─▶ the k nearest of each of its queries

A key is compared with a query by the one rank that owns its list, so neighbours are those of a search by one
rank, bit for bit for int8 codes. A rank holds the keys of its group, 1/W of them; many queries a call bring
many to each list, which is then read once for all of them.

Memory of a rank in a call of Q queries by all W ranks, k neighbours and P probes, in addition to its group:
at most 8 · k · Q bytes of answers as an owner, 8 · k · Q/W · min(W, P) of the owners' answers as a rank that
asks. `positions_of_a_call` chooses Q.

Q queries, D numbers in a key, K neighbours, P lists that a query probes, L lists, W ranks, M queries that an
owner gets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block, split_blocks
from mlpmem_ds.core.host import machine_id
from mlpmem_ds.engines.collectives.ranks import Ranks
from mlpmem_ds.engines.devices import free_host_bytes, identity_of, memory_bytes, ranks_of_a_gpu
from mlpmem_ds.formats.lists_directory import MappedLists
from mlpmem_ds.maths.distances import are_codes
from mlpmem_ds.maths.knn import pack_list_neighbours
from mlpmem_ds.maths.listed_keys import ID_AND_NORM_BYTES, ListedKeys
from mlpmem_ds.maths.neighbours import MISSING, Exclusion, PackedNeighbours, check_search
from mlpmem_ds.stages.retrieval.list_search import ListSearch

_logger = logging.getLogger(__name__)
SHARE_OF_MEMORY = 0.6
"""that a group may take of a GPU, or the groups of a host of what is free there"""
_CALL_QUERIES = 1 << 18  # of all ranks: 256 a list at 262,144 lists, 8 neighbours' batches at a thousand
_CALL_BYTES = 1 << 32
_MERGED_ROWS = 256  # whose neighbours stay in the cache


def positions_of_a_call(num_ranks: int, k: int, nprobe: int, block_size: int) -> int:
    """Queries that one rank asks in a call: its share of 2^18, fewer where the answers would take more than
    4 GB (see above), whole blocks and at least one."""
    answers = 8 * k * (num_ranks + min(num_ranks, nprobe))  # bytes for each query that a rank asks
    queries = min(-(-_CALL_QUERIES // num_ranks), _CALL_BYTES // answers)
    return max(1, queries // block_size) * block_size


class ListOwners:
    """The lists of a `ListSearch`, each group of them with the rank that owns it.

    `search` is called by all ranks as often, also by one that has no queries (left); `num_calls` counts.
    """

    def __init__(self, search: ListSearch, ranks: Ranks) -> None:
        self._search, self._ranks, self._device = search, ranks, search.device
        self._group: ListedKeys | None = None
        self._stops_W = np.empty(0, np.int64)
        self.num_calls = 0

    @property
    def num_bytes(self) -> int:
        return self._search.num_bytes

    @property
    def mapped(self) -> MappedLists | None:
        return self._search.mapped

    def prepare(self) -> None:
        """Make the lists where they are missing, and take this rank's group. Called by all ranks."""
        if self._group is None:
            self._search.prepare_together() if self._ranks.size > 1 else self._search.prepare()
            assert self._search.mapped is not None, "a search without a directory of lists has no groups"
            sizes_L = self._search.mapped.sizes_L
            self._stops_W = balanced_stops(sizes_L, self._ranks.size)
            first, stop = ([0, *self._stops_W.tolist()][self._ranks.rank + step] for step in (0, 1))
            self._group = self._take(first, stop)

    def search(self, queries_QD: np.ndarray, k: int, exclusion: Exclusion | None = None) -> PackedNeighbours:
        """`NeighbourSearch.search`, by all ranks together."""
        self.prepare()
        self.num_calls += 1
        assert self._group is not None
        is_integer = are_codes(queries_QD, self._group)
        id_bits = check_search(
            queries_QD, self._group.num_dims, self._group.num_keys, k, exclusion, is_integer
        )
        probes_QP = self._probes(queries_QD)
        rows = self._rows_by_owner(probes_QP)
        message = _Message(queries_QD.shape[1], queries_QD.dtype, probes_QP.shape[1], exclusion)
        asked = self._ranks.exchange(
            [message.pack(queries_QD, probes_QP, exclusion, rows_M) for rows_M in rows]
        )
        answers = self._ranks.exchange(self._answer(message, asked, k))
        with _threads(torch.get_num_threads()) as spread:
            packed_QK = merge_answers(answers, rows, len(queries_QD), k, spread)
        return PackedNeighbours(packed_QK=packed_QK, id_bits=id_bits, is_integer=is_integer)

    def list_sizes(self, queries_QD: np.ndarray) -> np.ndarray:
        return self._search.list_sizes(queries_QD)

    def _probes(self, queries_QD: np.ndarray) -> np.ndarray:
        if len(queries_QD):
            return self._search.probes(queries_QD)
        return np.empty((0, min(self._search.nprobe, self._stops_W[-1])), np.int64)

    def _rows_by_owner(self, probes_QP: np.ndarray) -> list[np.ndarray]:
        """The queries that probe a list of each rank, ascending."""
        owners_QP = np.searchsorted(self._stops_W, probes_QP, side="right").astype(np.int32)
        owners_QP[probes_QP < 0] = -1
        return [np.flatnonzero((owners_QP == rank).any(axis=1)) for rank in range(self._ranks.size)]

    def _answer(self, message: _Message, asked: Sequence[np.ndarray], k: int) -> list[np.ndarray]:
        """The k nearest of this rank's group for the queries of each rank, int64, no wider than needed."""
        assert self._group is not None
        queries_MD, probes_MP, exclusion = message.unpack(asked)
        packed_MK = self._search_group(queries_MD, probes_MP, k, exclusion)
        stops = np.cumsum([message.count(part) for part in asked])
        parts = np.split(packed_MK, stops[:-1])
        return [np.ascontiguousarray(part[:, : _width(part)]) for part in parts]

    def _search_group(
        self, queries_MD: np.ndarray, probes_MP: np.ndarray, k: int, exclusion: Exclusion | None
    ) -> np.ndarray:
        """int64 [M, K]. On a CPU several threads take queries side by side: much of a search is NumPy, which
        has one thread."""
        assert self._group is not None
        group, num_threads = self._group, torch.get_num_threads() if self._device.type == "cpu" else 1
        is_own_MP = (probes_MP >= group.first_list) & (probes_MP < group.first_list + group.num_lists)
        firsts_M = np.where(is_own_MP, probes_MP, MISSING).min(axis=1, initial=MISSING)
        order_M = np.argsort(firsts_M, kind="stable")  # a thread's queries probe the same lists
        packed_MK = np.empty((len(queries_MD), k), np.int64)

        def search(block: Block) -> None:
            rows = order_M[slice(*block)]
            found = pack_list_neighbours(
                queries_MD[rows],
                probes_MP[rows],
                group,
                k,
                exclusion=exclusion and exclusion.rows(rows),
                device=self._device,
            )
            packed_MK[rows] = found.packed_QK

        blocks = split_blocks(len(order_M), -(-max(1, len(order_M)) // num_threads))
        with _threads(num_threads) as spread:
            list(spread(search, blocks))
        return packed_MK

    def _take(self, first: int, stop: int) -> ListedKeys:
        """The lists [first, stop): in the memory of the device where they fit, else in that of the host, else
        in their mapped files."""
        assert self._search.mapped is not None
        lists = self._search.mapped.keys
        on_gpu, on_host = self._ranks_that_share()
        part = lists.part(first, stop)
        needed = part.num_bytes + ID_AND_NORM_BYTES * int(part.sizes_L.sum())
        on_device = memory_bytes(self._device) / on_gpu
        if self._device.type != "cpu" and needed <= SHARE_OF_MEMORY * on_device:
            return lists.group(first, stop, self._device)
        free = free_host_bytes() / on_host
        if len(lists.runs) > 1 and needed <= SHARE_OF_MEMORY * free:
            return lists.group(first, stop)
        if len(lists.runs) > 1:
            _logger.warning(
                "rank %d owns %.1f GB of keys, and its share of the free memory is %.1f GB: it reads them"
                " from the disk at each call; more hosts, or fewer ranks on each, would hold them",
                self._search.world.rank,
                needed / 1e9,
                free / 1e9,
            )
        return part

    def _ranks_that_share(self) -> tuple[int, int]:
        """Ranks that take groups of lists on this one's GPU, and on its host; this one included."""
        if self._ranks.size == 1:  # the others of its launch, if any, own all lists too, and tell nothing
            world = self._search.world
            return ranks_of_a_gpu(world), world.local_size or world.size
        own = (machine_id(), identity_of(self._device))
        places = self._ranks.gather(own)
        return places.count(own), [machine for machine, _ in places].count(own[0])


class _Message:
    """What an owner is told of each query, one row of bytes each: its key, the lists that it probes, and what
    it may not find."""

    def __init__(
        self, num_dims: int, key_dtype: np.dtype[Any], num_probes: int, exclusion: Exclusion | None
    ) -> None:
        fields: list[tuple[Any, ...]] = []
        if exclusion is not None:
            fields.append(("id", np.int64))
        if exclusion is not None and exclusion.first_hidden_Q is not None:
            fields += [("first_hidden", np.int64), ("stop_hidden", np.int64)]
        fields += [("probes", np.int32, (num_probes,)), ("key", key_dtype, (num_dims,))]
        self._dtype = np.dtype(fields)
        self._window = None if exclusion is None else exclusion.window

    def pack(
        self, queries_QD: np.ndarray, probes_QP: np.ndarray, exclusion: Exclusion | None, rows: np.ndarray
    ) -> np.ndarray:
        """Some of the queries: uint8 [M · bytes of a row]."""
        packed_M = np.empty(len(rows), self._dtype)
        packed_M["probes"], packed_M["key"] = probes_QP[rows], queries_QD[rows]
        if exclusion is not None:
            packed_M["id"] = exclusion.query_ids_Q[rows]
        if exclusion is not None and exclusion.first_hidden_Q is not None:
            assert exclusion.stop_hidden_Q is not None
            packed_M["first_hidden"] = exclusion.first_hidden_Q[rows]
            packed_M["stop_hidden"] = exclusion.stop_hidden_Q[rows]
        return packed_M.view(np.uint8).reshape(-1)

    def count(self, part: np.ndarray) -> int:
        """Queries in a message."""
        return len(part) // self._dtype.itemsize

    def unpack(self, parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, Exclusion | None]:
        """(queries [M, D], probes int64 [M, P], exclusion) of the messages of all ranks, one after the
        other."""
        packed_M = np.concatenate(parts).view(self._dtype)
        names = self._dtype.names or ()
        exclusion = None
        if self._window is not None:
            has_ranges = "first_hidden" in names
            exclusion = Exclusion(
                query_ids_Q=packed_M["id"].copy(),
                first_hidden_Q=packed_M["first_hidden"].copy() if has_ranges else None,
                stop_hidden_Q=packed_M["stop_hidden"].copy() if has_ranges else None,
                window=self._window,
            )
        return np.ascontiguousarray(packed_M["key"]), packed_M["probes"].astype(np.int64), exclusion


def balanced_stops(sizes_L: np.ndarray, num_groups: int) -> np.ndarray:
    """Where each of the groups of lists side by side ends, int64 [W]: groups with about as much work.

    A list of n keys is searched for about n queries more than an average one, where the queries are the keys:
    its work goes with n (n + mean). Groups of many lists have about as many keys too.
    """
    sizes_L = sizes_L.astype(np.float64)
    work_L = np.cumsum(sizes_L * (sizes_L + sizes_L.mean()))
    shares_W = np.arange(1, num_groups) * (work_L[-1] / num_groups)
    stops_W = np.append(np.searchsorted(work_L, shares_W, side="left") + 1, len(sizes_L))
    return np.minimum(stops_W, len(sizes_L)).astype(np.int64)


def merge_answers(
    answers: Sequence[np.ndarray],
    rows: Sequence[np.ndarray],
    num_queries: int,
    k: int,
    spread: Callable[..., Iterable[Any]] = map,
) -> np.ndarray:
    """The k least packed neighbours of each query in order, int64 [Q, K], of the answers of all owners.

    Args:
        answers: of each owner, packed neighbours in order, int64 [M, up to K].
        rows: the queries of each owner, ascending [M].
        num_queries: Q.
        k: K.
        spread: `map`, or that of a pool of threads.
    """
    packed_QK = np.empty((num_queries, k), np.int64)

    def merge(block: Block) -> None:
        filled_b, both_bW = np.zeros(block.size, np.int64), np.empty((block.size, 2 * k), np.int64)
        both_bW[:, :k] = MISSING
        for answer, rows_M in zip(answers, rows, strict=True):
            places, width = slice(*np.searchsorted(rows_M, block).tolist()), answer.shape[1]
            rows_m, answer_mK = rows_M[places] - block.start, answer[places]
            again = filled_b[rows_m] > 0
            filled_b[rows_m] = 1
            if not again.any():
                both_bW[rows_m, :width] = answer_mK
                continue
            both_mW = both_bW if len(rows_m) == block.size else both_bW[rows_m]
            both_mW[:, k : k + width] = answer_mK
            both_mW[:, k + width :] = MISSING
            both_mW.sort(axis=1, kind="stable")  # of two parts in order: NumPy merges them
            if both_mW is not both_bW:
                both_bW[rows_m] = both_mW
        packed_QK[slice(*block)] = both_bW[:, :k]

    list(spread(merge, split_blocks(num_queries, _MERGED_ROWS)))
    return packed_QK


def _width(packed_MK: np.ndarray) -> int:
    """Columns before the first in which every neighbour is missing."""
    return int(np.count_nonzero(packed_MK != MISSING, axis=1).max(initial=0))


@contextmanager
def _threads(count: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """`map` over so many threads, each with one thread of torch."""
    if count == 1:
        yield map
        return
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(before)
