"""Pipeline: keys and index → **nearest neighbours on a GPU** → targets: what knn.py does, in torch on any
device.

The packed neighbours are those of the CPU, so int8 codes give the same ids and distances bit for bit; the
tests run this path on the CPU too. The keys lie on the device where half of its free memory holds them, else
they come block by block.

Shape legend: Q queries (of a block), B keys of a block, K neighbours, N keys in all, D dimensions, P probes,
L lists, S survivors, M queries that probe one list, W the most candidates of a query in a block.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mlpmem_ds.maths.distances import are_codes, distance_ranks
from mlpmem_ds.maths.listed_keys import ListedKeys
from mlpmem_ds.maths.neighbours import (
    MISSING,
    NO_BOUND,
    Exclusion,
    PackedNeighbours,
    check_search,
)
from mlpmem_ds.maths.search_blocks import budget_blocks, growing_blocks, order_of_probes, probed_lists

Array: TypeAlias = np.ndarray[Any, Any]


def exact_neighbours_on_device(
    queries_QD: Array | Tensor,
    keys_ND: Any,
    k: int,
    *,
    exclusion: Exclusion | None,
    device: torch.device,
    query_block: int = 2048,
    key_block: int = 2**17,
) -> PackedNeighbours:
    """`exact_neighbours` on a device; the distances of a block take ``query_block * key_block * 4`` bytes of
    it."""
    num_keys, num_dims = keys_ND.shape
    is_integer = are_codes(queries_QD, keys_ND)
    id_bits = check_search(queries_QD, num_dims, num_keys, k, exclusion, is_integer)
    if _fits(keys_ND.nbytes, device):
        keys_ND = _on(keys_ND[:], device)
    hidden = _Hidden(exclusion, device)
    packed_QK = np.empty((len(queries_QD), k), np.int64)
    for query_start in range(0, len(queries_QD), query_block):
        block_QD = _on(queries_QD[query_start : query_start + query_block], device)
        best_QK = torch.full((len(block_QD), k), MISSING, dtype=torch.int64, device=device)
        for start, stop in growing_blocks(num_keys, key_block):
            ranks_QB = distance_ranks(block_QD, _on(keys_ND[start:stop], device), None)
            bound_Q = (best_QK.amax(dim=1) >> id_bits).clamp(max=NO_BOUND).to(torch.int32)
            rows_S, columns_S = torch.nonzero(ranks_QB < bound_Q[:, None], as_tuple=True)
            packed_S = (ranks_QB[rows_S, columns_S].to(torch.int64) << id_bits) + (columns_S + start)
            kept_S = ~hidden(rows_S + query_start, columns_S + start)
            best_QK = _smallest(best_QK, rows_S[kept_S], packed_S[kept_S])
        packed_QK[query_start : query_start + query_block] = best_QK.sort(dim=1).values.cpu().numpy()
    return PackedNeighbours(packed_QK=packed_QK, id_bits=id_bits, is_integer=is_integer)


def list_neighbours_on_device(
    queries_QD: Array | Tensor,
    probes_QP: Array,
    lists: ListedKeys,
    k: int,
    *,
    exclusion: Exclusion | None,
    device: torch.device,
    candidate_budget: int = 2**25,
) -> PackedNeighbours:
    """`list_neighbours` on a device: every list that a block of queries probes is multiplied once with all of
    them."""
    is_integer = are_codes(queries_QD, lists)
    id_bits = check_search(queries_QD, lists.num_dims, lists.num_keys, k, exclusion, is_integer)
    probes_QP = lists.local_probes(probes_QP, len(queries_QD))
    sizes_QP = lists.sizes_of(probes_QP)
    lists = _lists_near(lists, device)
    hidden = _Hidden(exclusion, device)
    packed_QK = np.full((len(queries_QD), k), MISSING, np.int64)
    order_Q = order_of_probes(probes_QP)
    for start, stop in budget_blocks(sizes_QP[order_Q].sum(1), candidate_budget):
        rows_B = order_Q[start:stop]
        sizes_MP = sizes_QP[rows_B]
        columns_MP = (
            np.cumsum(sizes_MP, axis=1) - sizes_MP
        )  # where the candidates of each probe begin in their row
        width = max(k, int(sizes_MP.sum(1).max(initial=0)))
        candidates_MW = torch.full((stop - start, width), MISSING, dtype=torch.int64, device=device)
        unused = np.zeros_like(sizes_MP)
        order, found = probed_lists(probes_QP[rows_B], sizes_MP, unused)
        for list_number, start_pair, stop_pair, _ in found:
            pairs_M = order[start_pair:stop_pair]
            rows = pairs_M // probes_QP.shape[1]
            ids_B, rows_M = _on(lists.ids_of(list_number), device), _on(rows, device)
            keys_BD = lists.keys_of(list_number)[0].to(device)
            ranks_MB = distance_ranks(_on(queries_QD[rows_B[rows]], device), keys_BD, None)
            packed_MB = (ranks_MB.to(torch.int64) << id_bits) + ids_B
            packed_MB[hidden(_on(rows_B[rows], device)[:, None], ids_B[None])] = MISSING
            first_M = _on(columns_MP.ravel()[pairs_M], device)
            places_MB = first_M[:, None] + torch.arange(len(ids_B), device=device)
            candidates_MW[rows_M[:, None], places_MB] = packed_MB
        packed_QK[rows_B] = candidates_MW.topk(k, dim=1, largest=False, sorted=True).values.cpu().numpy()
    return PackedNeighbours(packed_QK=packed_QK, id_bits=id_bits, is_integer=is_integer)


@lru_cache(maxsize=1)
def _lists_near(lists: ListedKeys, device: torch.device) -> ListedKeys:
    """The lists with their keys on the device if it has the room: once for all batches, which share them."""
    if not _fits(lists.num_bytes, device):
        return lists
    return replace(lists, runs=[replace(run, keys_ND=run.keys_ND.to(device)) for run in lists.runs])


class _Hidden:
    """`Exclusion.covers` on a device, as ranges of ids; nothing is hidden without one."""

    def __init__(self, exclusion: Exclusion | None, device: torch.device) -> None:
        self.ranges: list[tuple[Tensor, Tensor]] = []
        if exclusion is None:
            return
        ids_Q = _on(exclusion.query_ids_Q, device)
        self.ranges.append((ids_Q - exclusion.window, ids_Q + (exclusion.window + 1)))
        if exclusion.first_hidden_Q is not None and exclusion.stop_hidden_Q is not None:
            self.ranges.append((_on(exclusion.first_hidden_Q, device), _on(exclusion.stop_hidden_Q, device)))

    def __call__(self, query_rows: Tensor, key_ids: Tensor) -> Tensor:
        """True where the key is hidden from the query; rows and ids broadcast against each other."""
        hidden = torch.zeros_like(query_rows + key_ids, dtype=torch.bool)
        for first_Q, stop_Q in self.ranges:
            hidden |= (key_ids >= first_Q[query_rows]) & (key_ids < stop_Q[query_rows])
        return hidden


def _smallest(best_QK: Tensor, rows_S: Tensor, packed_S: Tensor) -> Tensor:
    """The K least of each row among the present ones and the new ones; ``rows_S`` ascends. In no order."""
    if not len(rows_S):
        return best_QK
    counts_Q = torch.bincount(rows_S, minlength=len(best_QK))
    firsts_Q = torch.cumsum(counts_Q, 0) - counts_Q
    more_QW = torch.full(
        (len(best_QK), int(counts_Q.max())), MISSING, dtype=torch.int64, device=best_QK.device
    )
    more_QW[rows_S, torch.arange(len(rows_S), device=rows_S.device) - firsts_Q[rows_S]] = packed_S
    both_QC = torch.cat([best_QK, more_QW], dim=1)
    return both_QC.topk(best_QK.shape[1], dim=1, largest=False, sorted=False).values


def _on(array: Any, device: torch.device) -> Tensor:
    """A tensor of an array on the device; read-only arrays (memory maps) are copied, unsigned ids widened."""
    if isinstance(array, Tensor):
        return array.to(device)
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)


def _fits(num_bytes: int, device: torch.device) -> bool:
    """Whether the keys can stay on the device; on a CPU they stay where they are."""
    return device.type == "cuda" and num_bytes <= torch.cuda.mem_get_info(device)[0] // 2
