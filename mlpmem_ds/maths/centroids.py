"""Pipeline: keys → **coarse lists** → index. Which centroids are nearest.

Centroids of codes are int8 (maths/kmeans.py), so that each comparison is of exact integers: the same result
for any batch, number of threads and device, with ties to the lower number.

Shape legend: N vectors, D dimensions, L centroids (lists), P centroids kept of each vector, B vectors of a
tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mlpmem_ds.maths.device_memory import tile_bytes
from mlpmem_ds.maths.distances import pad_codes, ranks_in_list, squared_distances, squared_norms

Array: TypeAlias = np.ndarray[Any, Any]

_TILE_ELEMENTS = 2**21
"""distances of a tile on a CPU: 8 MB, which stay in the cache between the product and the selection"""
_BYTES_ON_DEVICE = 16  # of a distance on a device: the product, and rank and number in one integer


@dataclass(frozen=True, kw_only=True, eq=False)
class CentroidTable:
    """Centroids on a device as they are compared there: int8 ones with their norms, padded once for a GPU's
    products (`pad_codes`), in float32 where they are not int8."""

    centroids_LD: Tensor
    norms_L: Tensor | None
    num_lists: int

    @classmethod
    def of(cls, centroids_LD: Tensor) -> CentroidTable:
        num_lists = len(centroids_LD)
        if centroids_LD.dtype != torch.int8:
            return cls(centroids_LD=centroids_LD.float(), norms_L=None, num_lists=num_lists)
        if centroids_LD.device.type != "cpu":
            centroids_LD = pad_codes(centroids_LD, -num_lists % 8)
        return cls(centroids_LD=centroids_LD, norms_L=squared_norms(centroids_LD), num_lists=num_lists)

    @property
    def device(self) -> torch.device:
        return self.centroids_LD.device


def nearest_centroids(
    vectors_ND: Tensor, centroids: Tensor | CentroidTable, count: int
) -> tuple[Array, Array]:
    """The `count` nearest centroids of each vector in the order (distance, number).

    Works on the device of the centroids (a tensor [L, D], or a table made of it once for many calls). Two
    int8 tensors give exact distances for any batch and device; others go through float32.

    Returns:
        numbers int64 and squared distances float32, both [N, P], P = min(count, L).
    """
    table = CentroidTable.of(centroids) if isinstance(centroids, Tensor) else centroids
    is_integer = vectors_ND.dtype == torch.int8 and table.norms_L is not None
    if not is_integer:
        floats_LD = table.centroids_LD[: table.num_lists, : vectors_ND.shape[1]].float()
        table = CentroidTable(centroids_LD=floats_LD, norms_L=None, num_lists=table.num_lists)
    nearest = _nearest_on_host if table.device.type == "cpu" else _nearest_on_device
    numbers_NP, ranks_NP = nearest(vectors_ND, table, min(count, table.num_lists))
    return numbers_NP, ranks_NP.astype(np.float32) if is_integer else ranks_NP.view(np.float32)


def rows_of_tile(num_lists: int, tile_bytes: int) -> int:
    """How many vectors are compared with all centroids at once in so many bytes of a device."""
    return max(1, tile_bytes // (_BYTES_ON_DEVICE * num_lists))


def _nearest_on_host(vectors_ND: Tensor, table: CentroidTable, count: int) -> tuple[Array, Array]:
    """(numbers int64, ranks int32), both [N, P]: tiles that stay in the cache."""
    num_vectors, num_lists = len(vectors_ND), table.num_lists
    numbers_NP = np.empty((num_vectors, count), np.int64)
    ranks_NP = np.empty((num_vectors, count), np.int32)
    step = max(1, _TILE_ELEMENTS // num_lists)
    buffer = torch.empty(min(step, num_vectors) * num_lists, dtype=torch.int32)
    for start in range(0, num_vectors, step):
        tile_BD = vectors_ND[start : start + step]
        if table.norms_L is None:
            distances_BL = squared_distances(tile_BD, table.centroids_LD)
            ranks_BL = distances_BL.abs_().view(torch.int32)  # a non-negative float orders like its bits
        else:
            out = buffer[: len(tile_BD) * num_lists].view(len(tile_BD), num_lists)
            ranks_BL = squared_distances(tile_BD, table.centroids_LD, out=out, key_norms_K=table.norms_L)
        numbers_NP[start : start + step], ranks_NP[start : start + step] = _smallest_on_host(ranks_BL, count)
    return numbers_NP, ranks_NP


def _nearest_on_device(vectors_ND: Tensor, table: CentroidTable, count: int) -> tuple[Array, Array]:
    """What `_nearest_on_host` gives: tiles as large as a device's memory allows, and one copy back.

    Rank and number are packed in one integer, so that ties go to the lower number. A vector's own squared
    length is added to what is kept alone.
    """
    parts, device = [], table.device
    numbers_L = torch.arange(table.num_lists, device=device)
    step = rows_of_tile(table.num_lists, tile_bytes(device))
    for start in range(0, len(vectors_ND), step):
        tile_BD = vectors_ND[start : start + step].to(device)
        if table.norms_L is not None and tile_BD.shape[1] < table.centroids_LD.shape[1]:
            tile_BD = pad_codes(tile_BD, 0)
        ranks_BL = ranks_in_list(tile_BD, table.centroids_LD, table.norms_L)[:, : table.num_lists]
        packed_BL = ranks_BL.to(torch.int64).mul_(1 << 32).add_(numbers_L)
        if count == 1:
            packed_BP = packed_BL.amin(dim=1, keepdim=True)
        else:
            packed_BP = packed_BL.topk(count, dim=1, largest=False, sorted=True).values
        if table.norms_L is not None:
            packed_BP += squared_norms(tile_BD)[:, None].to(torch.int64) << 32
        parts.append(packed_BP)
    packed_NP = torch.cat(parts).cpu().numpy() if parts else np.empty((0, count), np.int64)
    return packed_NP & 0xFFFFFFFF, (packed_NP >> 32).astype(np.int32)


def _smallest_on_host(ranks_BL: Tensor, count: int) -> tuple[Array, Array]:
    """(numbers, ranks), both [B, P], least first, ties to the lower number; int32 on the CPU.

    NumPy's argmin takes a twentieth of packing the number with the rank in 64 bits, and its first
    occurrence is the lower number. For more than one the ranks alone are partitioned, and only what is not
    above the P-th is packed and sorted.
    """
    ranks = ranks_BL.numpy()
    if count == 1:
        numbers_B1 = ranks.argmin(axis=1)[:, None]
        return numbers_B1, np.take_along_axis(ranks, numbers_B1, axis=1)
    bound_B = np.partition(ranks, count - 1, axis=1)[:, count - 1]
    kept_BL = ranks <= bound_B[:, None]
    counts_B = np.count_nonzero(kept_BL, axis=1)
    flat_S = np.flatnonzero(kept_BL)
    rows_S = np.repeat(np.arange(len(ranks)), counts_B)
    columns_S = flat_S - rows_S * ranks.shape[1]
    packed_BC = np.full((len(ranks), counts_B.max()), np.iinfo(np.int64).max)
    places_S = np.arange(len(flat_S)) - (np.cumsum(counts_B) - counts_B)[rows_S]
    packed_BC[rows_S, places_S] = (ranks.ravel()[flat_S].astype(np.int64) << 32) | columns_S
    packed_BC.sort(axis=1)
    return packed_BC[:, :count] & 0xFFFFFFFF, (packed_BC[:, :count] >> 32).astype(np.int32)
