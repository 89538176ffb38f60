"""Pipeline: keys and index → **nearest neighbours on a GPU** → targets: list search of knn.py, in torch on
any device.

A launch costs a GPU as much as a million candidates, so nothing is done list by list: queries come in calls
of many thousands, the pairs of all of them with their lists are cut into tiles (list_tiles.py), and tiles of
about one size are multiplied, measured and packed together: codes by a kernel of Triton where there is one,
else in torch. What is found stays on the device until the call ends.

The packed neighbours are those of the CPU, for int8 codes bit for bit; the tests run this path on the CPU.

Shape legend: Q queries of a call, B queries of a block, P probes, L lists, N keys, D dimensions, K neighbours
kept, or keys of a tile, W candidates of a row, S pairs, T tiles, R pairs of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mlpmem_ds.maths import kernels
from mlpmem_ds.maths.device_memory import free_bytes, on_device, tile_bytes
from mlpmem_ds.maths.distances import EXACT_DIMS_FLOAT32, are_codes, check_dims
from mlpmem_ds.maths.hidden_on_device import HiddenIds
from mlpmem_ds.maths.knn_on_device import with_query_norms
from mlpmem_ds.maths.list_tiles import Tiles, cut_tiles, group_tiles, split_by_pairs
from mlpmem_ds.maths.listed_keys import ID_AND_NORM_BYTES, ListedKeys, ids_as_tensor
from mlpmem_ds.maths.neighbours import MISSING, Exclusion, PackedNeighbours, check_search, merge_neighbours
from mlpmem_ds.maths.search_blocks import budget_blocks, rectangle_blocks

Array: TypeAlias = np.ndarray[Any, Any]


def list_neighbours_on_device(
    queries_QD: Array | Tensor,
    probes_QP: Array,
    lists: ListedKeys,
    k: int,
    *,
    exclusion: Exclusion | None,
    device: torch.device,
    budget: int | None = None,
) -> PackedNeighbours:
    """`pack_list_neighbours` on a device.

    Lists that `ListedKeys.group` has put on it are searched where they are; others are copied there at each
    call, as many at a time as half of its memory holds. ``budget``: bytes for candidates, and once more for a
    group of tiles; None: `tile_bytes`.
    """
    is_integer = are_codes(queries_QD, lists)
    id_bits = check_search(queries_QD, lists.num_dims, lists.num_keys, k, exclusion, is_integer)
    if is_integer:
        check_dims(lists.num_dims)
    local_QP = lists.local_probes(probes_QP, len(queries_QD))
    queries = on_device(queries_QD, device)
    hidden = HiddenIds(exclusion, device)
    found = []
    for group, first in _pieces_on_device(lists, device):
        shifted_QP = local_QP - first
        inside_QP = (local_QP >= first) & (shifted_QP < group.num_lists)
        search = _ListSearch(
            queries_QD=queries,
            hidden=hidden,
            lists=group,
            ids_N=ids_as_tensor(group.runs[0]),
            k=k,
            id_bits=id_bits,
            is_integer=is_integer,
            budget=budget or tile_bytes(device),
        )
        packed_QK = search.nearest(on_device(np.where(inside_QP, shifted_QP, -1), device))
        found.append(
            PackedNeighbours(packed_QK=packed_QK.cpu().numpy(), id_bits=id_bits, is_integer=is_integer)
        )
    if not found:  # there is no list
        none_QK = np.full((len(queries_QD), k), MISSING)
        found.append(PackedNeighbours(packed_QK=none_QK, id_bits=id_bits, is_integer=is_integer))
    return merge_neighbours(found)


def _pieces_on_device(lists: ListedKeys, device: torch.device) -> Iterator[tuple[ListedKeys, int]]:
    """(lists in one piece on the device, number of the first among all that are here): all of them, or as
    many at a time as there is room for."""
    if lists.device == device and len(lists.runs) == 1:
        yield lists, 0
        return
    room = free_bytes(device) // 2 if device.type == "cuda" else lists.num_bytes + 1
    row_bytes = lists.num_dims * lists.dtype.itemsize + ID_AND_NORM_BYTES
    for start, stop in budget_blocks(lists.sizes_L, max(1, room // row_bytes)):
        yield lists.group(lists.first_list + start, lists.first_list + stop, device), start


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """Queries of a call that are searched together.

    Attributes:
        rows_B: which queries of the call they are.
        queries_BD: their vectors.
        rows_S: the query of each pair, counted in the block; pairs lie list by list.
        places_S: where in ``candidates`` those of a pair begin.
        candidates: packed, [B * W + 1]: W of each query, and one place for what is no candidate.
    """

    rows_B: Tensor
    queries_BD: Tensor
    rows_S: Tensor
    places_S: Tensor
    candidates: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _ListSearch:
    """One call: queries and the lists in one piece, all on a device."""

    queries_QD: Tensor
    hidden: HiddenIds
    lists: ListedKeys
    ids_N: Tensor
    k: int
    id_bits: int
    is_integer: bool
    budget: int

    def nearest(self, probes_QP: Tensor) -> Tensor:
        """Packed neighbours [Q, K] of the queries; probes count the lists that are here, -1 = none."""
        device, k, num_queries = self.queries_QD.device, self.k, len(probes_QP)
        best_QK = torch.full((num_queries, k), MISSING, dtype=torch.int64, device=device)
        if not probes_QP.numel() or not self.lists.num_lists:
            return best_QK
        sizes_L = on_device(self.lists.sizes_L, device)
        sizes_QP = torch.where(probes_QP >= 0, sizes_L[probes_QP], 0)
        # Queries that share a list are searched together: its keys are then read once for all of them.
        first_lists_Q = torch.where(probes_QP >= 0, probes_QP, self.lists.num_lists).amin(dim=1)
        order_Q = torch.argsort(first_lists_Q, stable=True)
        widths_Q = sizes_QP.sum(dim=1)[order_Q].clamp(min=k).cpu().numpy()
        for start, stop in rectangle_blocks(widths_Q, self.budget // 8):
            rows_B = order_Q[start:stop]
            block = self._open_block(
                rows_B, probes_QP[rows_B], sizes_QP[rows_B], int(widths_Q[start:stop].max())
            )
            candidates_BW = block.candidates[:-1].view(stop - start, -1)
            found_BK = candidates_BW.topk(k, dim=1, largest=False, sorted=True).values
            best_QK[rows_B] = with_query_norms(found_BK, block.queries_BD, self.id_bits, self.is_integer)
        return best_QK

    def _open_block(self, rows_B: Tensor, probes_BP: Tensor, sizes_BP: Tensor, width: int) -> _Block:
        """A block with the candidates of all its pairs."""
        num_rows, num_probes = probes_BP.shape
        starts_BP = torch.cumsum(sizes_BP, dim=1) - sizes_BP
        starts_BP += torch.arange(num_rows, device=rows_B.device)[:, None] * width
        num_lists = self.lists.num_lists
        lists_S, pairs_S = torch.where(probes_BP >= 0, probes_BP, num_lists).ravel().sort(stable=True)
        num_pairs_L = torch.bincount(lists_S, minlength=num_lists + 1)[:num_lists].cpu().numpy()
        block = _Block(
            rows_B=rows_B,
            queries_BD=self.queries_QD[rows_B],
            rows_S=pairs_S // num_probes,
            places_S=starts_BP.ravel()[pairs_S],
            candidates=torch.full((num_rows * width + 1,), MISSING, dtype=torch.int64, device=rows_B.device),
        )
        tiles = cut_tiles(num_pairs_L, self.lists.runs[0].offsets_L1)
        if self.is_integer and kernels.usable(block.candidates):
            self._measure_by_kernel(block, tiles)
        else:
            for group, num_pairs, num_keys in group_tiles(tiles, self.lists.num_dims, self.budget):
                self._measure(block, group, num_pairs, num_keys)
        return block

    def _measure_by_kernel(self, block: _Block, tiles: Tiles) -> None:
        """Pack the candidates of all tiles into the block, in a launch for each size of tiles."""
        from .kernels.list_candidates import list_candidates

        run, device = self.lists.runs[0], block.candidates.device
        assert run.norms_N is not None
        bounds_HS = self.hidden.bounds(block.rows_B[block.rows_S])
        for group, num_pairs in split_by_pairs(tiles):
            list_candidates(
                block.candidates,
                queries_BD=block.queries_BD,
                keys_ND=run.keys_ND,
                norms_N=run.norms_N,
                ids_N=self.ids_N,
                rows_S=block.rows_S,
                places_S=block.places_S,
                bounds_HS=bounds_HS,
                tiles_5T=on_device(group.table, device),
                max_pairs=num_pairs,
                id_bits=self.id_bits,
            )

    def _measure(self, block: _Block, tiles: Tiles, num_pairs: int, num_keys: int) -> None:
        """Pack the candidates of tiles of at most so many pairs and keys into the block."""
        run, device = self.lists.runs[0], block.candidates.device
        first_pair_T1, pairs_T1, first_key_T1, keys_T1, column_T1 = on_device(tiles.table, device)[:, :, None]
        steps_R, steps_K = torch.arange(num_pairs, device=device), torch.arange(num_keys, device=device)
        is_pair_TR, is_key_TK = steps_R < pairs_T1, steps_K < keys_T1
        pairs_TR = torch.where(is_pair_TR, first_pair_T1 + steps_R, 0)
        keys_TK = torch.where(is_key_TK, first_key_T1 + steps_K, 0)
        rows_TR, ids_TK = block.rows_S[pairs_TR], self.ids_N[keys_TK]
        packed_TRK = pack_tiles(
            block.queries_BD[rows_TR],
            run.keys_ND[keys_TK],
            None if run.norms_N is None else run.norms_N[keys_TK],
            ids_TK,
            self.id_bits,
        )
        is_hidden_TRK = self.hidden.mask(block.rows_B[rows_TR][:, :, None], ids_TK[:, None, :])
        if is_hidden_TRK is not None:
            packed_TRK.masked_fill_(is_hidden_TRK, MISSING)
        places_TRK = block.places_S[pairs_TR][:, :, None] + (column_T1 + steps_K)[:, None, :]
        is_none_TRK = (is_pair_TR[:, :, None] & is_key_TK[:, None, :]).logical_not_()
        places_TRK.masked_fill_(is_none_TRK, len(block.candidates) - 1)
        block.candidates[places_TRK] = packed_TRK


def pack_tiles(
    queries_TRD: Tensor, keys_TKD: Tensor, norms_TK: Tensor | None, ids_TK: Tensor, id_bits: int
) -> Tensor:
    """Packed neighbours [T, R, K], int64: of each tile every query with every key.

    For int8 codes (``norms_TK`` is given) the rank lacks the query's own squared length, as in
    `ranks_in_list`; for float keys it is the bits of the distance.
    """
    if norms_TK is None:
        queries_TRD, keys_TKD = queries_TRD.float(), keys_TKD.float()
        distances_TRK = torch.baddbmm(
            keys_TKD.square().sum(2)[:, None, :], queries_TRD, keys_TKD.transpose(1, 2), alpha=-2
        )
        distances_TRK = distances_TRK.add_(queries_TRD.square().sum(2, keepdim=True)).clamp_(min=0).abs_()
        return (distances_TRK.view(torch.int32).to(torch.int64) << id_bits) + ids_TK[:, None, :]
    products_TRK = None
    for start in range(0, queries_TRD.shape[2], EXACT_DIMS_FLOAT32):
        dims = slice(start, start + EXACT_DIMS_FLOAT32)
        floats = (queries_TRD[:, :, dims].float(), keys_TKD[:, :, dims].float().transpose(1, 2))
        part_TRK = torch.bmm(*floats).to(torch.int64)
        products_TRK = part_TRK if products_TRK is None else products_TRK.add_(part_TRK)
    assert products_TRK is not None
    norms_and_ids_TK = (norms_TK.to(torch.int64) << id_bits) + ids_TK
    return torch.sub(norms_and_ids_TK[:, None, :], products_TRK, alpha=2 << id_bits, out=products_TRK)
