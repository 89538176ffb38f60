"""Pipeline: keys → **nearest neighbours on a GPU** → targets: exact search of knn.py, in torch on any device.

The packed neighbours are those of the CPU, so int8 codes give the same ids and distances bit for bit; the
tests run this path on the CPU too. Keys that the device has room for lie on it, once for all searches
(`load_keys`); others come block by block at each.

Shape legend: Q queries (of a block), B keys of a block, K neighbours, N keys in all, D dimensions, S keys
that are nearer than the bound, W the most of them of a query, C kept and new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mlpmem_ds.maths.device_memory import fits, on_device, tile_bytes
from mlpmem_ds.maths.distances import are_codes, ranks_in_list, squared_norms
from mlpmem_ds.maths.hidden_on_device import HiddenIds
from mlpmem_ds.maths.neighbours import MISSING, NO_BOUND, Exclusion, PackedNeighbours, check_search
from mlpmem_ds.maths.search_blocks import growing_blocks

Array: TypeAlias = np.ndarray[Any, Any]

_QUERY_BLOCK = 2048
_BYTES_OF_RANK = 16  # the product, whether it is below the bound, and where; few survive
_UPLOADED_KEYS = 1 << 16  # at a time, so that the host holds no copy of all keys


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceKeys:
    """All keys on a device; ``norms_N`` int32, the `squared_norms` of int8 codes, None for float keys."""

    keys_ND: Tensor
    norms_N: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.keys_ND), self.keys_ND.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.keys_ND.dtype

    @property
    def device(self) -> torch.device:
        return self.keys_ND.device

    def block(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        return self.keys_ND[start:stop], None if self.norms_N is None else self.norms_N[start:stop]


@dataclass(frozen=True, kw_only=True, eq=False)
class HostKeys:
    """Keys that come to a device block by block, at each search again."""

    keys_ND: Any
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        num_keys, num_dims = self.keys_ND.shape
        return num_keys, num_dims

    @property
    def dtype(self) -> Any:
        return self.keys_ND.dtype

    def block(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        keys_BD = on_device(self.keys_ND[start:stop], self.device)
        return keys_BD, squared_norms(keys_BD) if are_codes(keys_BD) else None


def load_keys(keys_ND: Any, device: torch.device) -> DeviceKeys | HostKeys:
    """Keys (an array, a tensor, or what has `shape`, `dtype`, `nbytes` and slices) copied to a device once
    for all searches; where they do not fit (`fits`), they stay where they are."""
    if not fits(keys_ND.nbytes, device):
        return HostKeys(keys_ND=keys_ND, device=device)
    num_keys, num_dims = keys_ND.shape
    dtype = (
        keys_ND.dtype if isinstance(keys_ND, Tensor) else torch.from_numpy(np.empty(0, keys_ND.dtype)).dtype
    )
    keys = torch.empty((num_keys, num_dims), dtype=dtype, device=device)
    norms_N = torch.empty(num_keys, dtype=torch.int32, device=device) if are_codes(keys) else None
    for start in range(0, num_keys, _UPLOADED_KEYS):
        rows = slice(start, min(start + _UPLOADED_KEYS, num_keys))
        keys[rows] = on_device(keys_ND[rows], device)
        if norms_N is not None:
            norms_N[rows] = squared_norms(keys[rows])
    return DeviceKeys(keys_ND=keys, norms_N=norms_N)


def exact_neighbours_on_device(
    queries_QD: Array | Tensor,
    keys: DeviceKeys | HostKeys,
    k: int,
    *,
    exclusion: Exclusion | None,
    query_block: int = _QUERY_BLOCK,
    key_block: int | None = None,
) -> PackedNeighbours:
    """`pack_exact_neighbours` on the device of the keys; ``key_block`` is as large as its memory allows
    (None)."""
    (num_keys, num_dims), device = keys.shape, keys.device
    is_integer = are_codes(queries_QD, keys)
    id_bits = check_search(queries_QD, num_dims, num_keys, k, exclusion, is_integer)
    key_block = key_block or max(1, tile_bytes(device) // (_BYTES_OF_RANK * query_block))
    hidden = HiddenIds(exclusion, device)
    packed_QK = np.empty((len(queries_QD), k), np.int64)
    for query_start in range(0, len(queries_QD), query_block):
        block_QD = on_device(queries_QD[query_start : query_start + query_block], device)
        best_QK = torch.full((len(block_QD), k), MISSING, dtype=torch.int64, device=device)
        for start, stop in growing_blocks(num_keys, key_block):
            ranks_QB = ranks_in_list(block_QD, *keys.block(start, stop))
            bound_Q = (best_QK.amax(dim=1) >> id_bits).clamp(max=NO_BOUND).to(torch.int32)
            rows_S, columns_S = torch.nonzero(ranks_QB < bound_Q[:, None], as_tuple=True)
            packed_S = (ranks_QB[rows_S, columns_S].to(torch.int64) << id_bits) + (columns_S + start)
            is_hidden_S = hidden.mask(rows_S + query_start, columns_S + start)
            if is_hidden_S is not None:
                packed_S.masked_fill_(is_hidden_S, MISSING)
            best_QK = _smallest(best_QK, rows_S, packed_S)
        best_QK = with_query_norms(best_QK.sort(dim=1).values, block_QD, id_bits, is_integer)
        packed_QK[query_start : query_start + query_block] = best_QK.cpu().numpy()
    return PackedNeighbours(packed_QK=packed_QK, id_bits=id_bits, is_integer=is_integer)


def with_query_norms(best_QK: Tensor, queries_QD: Tensor, id_bits: int, is_integer: bool) -> Tensor:
    """Packed neighbours with distances, of packed ones whose rank is what `ranks_in_list` gives."""
    if not is_integer:
        return best_QK
    offsets_Q1 = squared_norms(queries_QD)[:, None].to(torch.int64) << id_bits
    return torch.where(best_QK == MISSING, MISSING, best_QK + offsets_Q1)


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
