"""Pipeline: candidates of a search → **their exact distances**, the nearest first.

What an index of compressed vectors finds is put in the order of the stored keys' own distances.

Shape legend: Q queries, C candidates of a query, B queries of a chunk, D dimensions.
"""

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mlpmem_ds.maths.distances import are_codes
from mlpmem_ds.maths.neighbours import MISSING, PackedNeighbours, check_search

Array: TypeAlias = np.ndarray[Any, Any]

# Gathered keys of a chunk of queries: 8,192 of 256 int8 numbers; four times as many gather no faster.
_GATHERED_BYTES = 1 << 21
# Numbers of keys that are floats at a time: 1 MB; what leaves the cache takes twice as long.
_FLOAT_ELEMENTS = 1 << 18
_EXACT_DIMS_FLOAT32 = 1040
"""int8 codes of so many numbers: products and squared lengths are at most 127² · 1,040 < 2^24, exact in
float32"""


def rescore(queries_QD: Array, ids_QC: Array, keys_ND: Any) -> PackedNeighbours:
    """The candidates of each query (ids int64, -1 = none, each at most once in a row) in the order
    (distance, id).

    ``keys_ND`` has `shape`, `dtype` and rows at any ids (an array, or rows of files). With int8 codes
    distances are exact integers; with float keys they are float32.
    """
    num_keys, num_dims = keys_ND.shape
    is_integer = are_codes(queries_QD, keys_ND)
    id_bits = check_search(queries_QD, num_dims, num_keys, ids_QC.shape[1], None, is_integer)
    packed_QC = np.empty(ids_QC.shape, np.int64)
    squared_distances = _of_codes if is_integer else _of_floats
    row_bytes = num_dims * keys_ND.dtype.itemsize
    step = max(1, _GATHERED_BYTES // max(1, ids_QC.shape[1] * row_bytes))
    for start in range(0, len(ids_QC), step):
        rows = slice(start, start + step)
        ids_BC = ids_QC[rows]
        keys_BCD = torch.from_numpy(keys_ND[np.maximum(ids_BC, 0).ravel()]).view(*ids_BC.shape, num_dims)
        ranks_BC = squared_distances(torch.from_numpy(queries_QD[rows]), keys_BCD).numpy().astype(np.int64)
        packed_QC[rows] = np.where(ids_BC < 0, MISSING, (ranks_BC << id_bits) | ids_BC)
    packed_QC.sort(axis=1)
    return PackedNeighbours(packed_QK=packed_QC, id_bits=id_bits, is_integer=is_integer)


def _of_codes(queries_BD: Tensor, keys_BCD: Tensor) -> Tensor:
    """Exact squared distances, int32 [B, C]."""
    distances_BC = torch.empty(keys_BCD.shape[:2], dtype=torch.int32)
    dtype = torch.float32 if keys_BCD.shape[2] <= _EXACT_DIMS_FLOAT32 else torch.float64
    queries_BD = queries_BD.to(dtype)
    chunks = _cached_rows(keys_BCD)
    # One for all chunks: page faults of fresh ones cost as much again.
    buffer = torch.empty(keys_BCD[chunks[0]].shape, dtype=dtype)
    for rows in chunks:
        queries, keys = queries_BD[rows], buffer[: len(queries_BD[rows])].copy_(keys_BCD[rows])
        products = (keys @ queries[:, :, None])[:, :, 0].to(torch.int32)
        norms = keys.square_().sum(dim=2).to(torch.int32)
        norms += queries.square().sum(dim=1, keepdim=True).to(torch.int32)
        distances_BC[rows] = norms.sub_(products, alpha=2)
    return distances_BC


def _of_floats(queries_BD: Tensor, keys_BCD: Tensor) -> Tensor:
    """The bits of the squared distances in float32, which order like them: int32 [B, C]."""
    distances_BC = torch.empty(keys_BCD.shape[:2])
    for rows in _cached_rows(keys_BCD):
        differences = keys_BCD[rows].float() - queries_BD[rows].float()[:, None]
        distances_BC[rows] = differences.square_().sum(dim=2)
    return distances_BC.view(torch.int32)


def _cached_rows(keys_BCD: Tensor) -> list[slice]:
    """The queries in chunks whose keys stay in the cache as floats."""
    step = max(1, _FLOAT_ELEMENTS // max(1, keys_BCD.shape[1] * keys_BCD.shape[2]))
    return [slice(start, start + step) for start in range(0, len(keys_BCD), step)]
