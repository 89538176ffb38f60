"""Pipeline: keys → **distances** → nearest neighbours. Squared Euclidean distances on any device, exact for
int8 codes.

Shape legend: Q queries, K keys of a block, N rows, D dimensions.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

CPU = torch.device("cpu")
EXACT_DIMS_FLOAT32 = 1024
"""1024 * 128 * 128 = 2**24: below it every partial sum of int8 products is exact in float32"""
_MAX_DIMS = np.iinfo(np.int32).max // 255**2


def squared_distances(
    queries_QD: Tensor, keys_KD: Tensor, *, out: Tensor | None = None, key_norms_K: Tensor | None = None
) -> Tensor:
    """Squared Euclidean distances [Q, K]: int32 and exact for two int8 tensors, else float32, at least 0, not
    bit-exact.

    ``out`` (int32 [Q, K], contiguous) may receive the integers: page faults of a fresh result cost as much as
    the product. ``key_norms_K`` are the keys' `squared_norms` if the caller has them (int8 keys only). Raises
    ValueError when an exact distance could pass int32 (more than 33,025 dimensions).
    """
    if queries_QD.shape[1] != keys_KD.shape[1]:
        raise ValueError(f"queries have {queries_QD.shape[1]} dimensions, keys {keys_KD.shape[1]}")
    if not are_codes(queries_QD, keys_KD):
        queries_QD, keys_KD = queries_QD.float(), keys_KD.float()
        distances_QK = torch.addmm(keys_KD.square().sum(1), queries_QD, keys_KD.t(), alpha=-2)
        return distances_QK.add_(queries_QD.square().sum(1, keepdim=True)).clamp_(min=0)
    check_dims(queries_QD.shape[1])
    products_QK = _integer_products(queries_QD, keys_KD, out)
    norms_K = squared_norms(keys_KD) if key_norms_K is None else key_norms_K
    torch.sub(norms_K, products_QK, alpha=2, out=products_QK)
    return products_QK.add_(squared_norms(queries_QD)[:, None])


def check_dims(num_dims: int) -> None:
    """Refuse int8 codes whose distances could pass int32."""
    if num_dims > _MAX_DIMS:
        raise ValueError(f"int8 codes of {num_dims} dimensions overflow int32; use at most {_MAX_DIMS}")


def distance_ranks(queries_QD: Tensor, keys_KD: Tensor, scratch: Tensor | None) -> Tensor:
    """int32 [Q, K] that orders like the distances.

    ``scratch``, int32 of Q K numbers or more, holds the result for int8 codes; None: a tensor of its own.
    """
    if not are_codes(queries_QD, keys_KD):
        # The absolute value, because inf - inf has the sign bit.
        return squared_distances(queries_QD, keys_KD).abs_().view(torch.int32)
    if scratch is not None:
        scratch = scratch[: len(queries_QD) * len(keys_KD)].view(len(queries_QD), len(keys_KD))
    return squared_distances(queries_QD, keys_KD, out=scratch)


def ranks_in_list(
    queries_MD: Tensor, keys_KD: Tensor, key_norms_K: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """int32 [M, K] that orders the keys for each query like the distances do, in ``out`` (contiguous) if it
    is given.

    For int8 codes the distance less the query's own squared length, which is the same in all the query's
    lists: one pass less over the tile. For float keys the bits of the distance.
    """
    if not are_codes(queries_MD, keys_KD):
        ranks_MK = distance_ranks(queries_MD, keys_KD, None)
        return ranks_MK if out is None else out.copy_(ranks_MK)
    check_dims(queries_MD.shape[1])
    norms_K = squared_norms(keys_KD) if key_norms_K is None else key_norms_K
    products_MK = _integer_products(queries_MD, keys_KD, out)
    return torch.sub(norms_K, products_MK, alpha=2, out=products_MK if out is None else out)


def are_codes(*arrays: Any) -> bool:
    """Are all of these int8 (NumPy or torch)?"""
    return all(array.dtype in (np.dtype(np.int8), torch.int8) for array in arrays)


def _integer_products(queries_QD: Tensor, keys_KD: Tensor, out: Tensor | None) -> Tensor:
    size = (len(queries_QD), len(keys_KD))
    if keys_KD.device.type == "cuda":
        return padded_products(queries_QD, keys_KD)
    products_QK = torch.empty(size, dtype=torch.int32, device=keys_KD.device) if out is None else out
    if _may_use_integer_matmul(queries_QD, keys_KD):
        return torch._int_mm(queries_QD.contiguous(), keys_KD.contiguous().t(), out=products_QK)
    products_QK.zero_()
    for start in range(0, queries_QD.shape[1], EXACT_DIMS_FLOAT32):
        dims = slice(start, start + EXACT_DIMS_FLOAT32)
        products_QK += (queries_QD[:, dims].float() @ keys_KD[:, dims].float().t()).to(torch.int32)
    return products_QK


def padded_products(queries_QD: Tensor, keys_KD: Tensor) -> Tensor:
    """Products int32 [Q, K] of int8 rows by `torch._int_mm`, which on CUDA wants more than 16 rows and
    multiples of 8.

    Rows and dimensions of zeros are added where they are wanting; they change no product. What has them is
    not copied.
    """
    num_queries, num_keys = len(queries_QD), len(keys_KD)
    queries_QD = pad_codes(queries_QD, max(0, 17 - num_queries))
    return torch._int_mm(queries_QD, pad_codes(keys_KD, -num_keys % 8).t())[:num_queries, :num_keys]


def pad_codes(codes_ND: Tensor, more_rows: int) -> Tensor:
    """int8 rows in one piece with some rows of zeros more, and dimensions of zeros up to a multiple of 8; no
    copy where nothing is wanting."""
    more_dims = -codes_ND.shape[1] % 8
    if more_rows or more_dims:  # without either `pad` would copy
        codes_ND = pad(codes_ND, (0, more_dims, 0, more_rows))
    return codes_ND.contiguous()


def _may_use_integer_matmul(queries_QD: Tensor, keys_KD: Tensor) -> bool:
    """Is `torch._int_mm` exact here? On CPU one dimension gives noise (torch 2.13)."""
    return keys_KD.device.type == "cpu" and queries_QD.shape[1] > 1 and _cpu_integer_matmul_is_exact()


@cache
def _cpu_integer_matmul_is_exact() -> bool:
    """x86 before VNNI adds pairs of products in saturating int16: 127 * 127 comes out wrong (try
    ONEDNN_MAX_CPU_ISA=AVX2)."""
    codes = torch.full((64, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(codes, codes.t()) == 64 * 127 * 127).all())


def squared_norms(codes_ND: Tensor) -> Tensor:
    """int32 [N]: the squared length of each int8 row."""
    wide_ND = codes_ND.to(torch.int32)
    # square_() of int32 took ten times as long (torch 2.13, CPU).
    return wide_ND.mul_(wide_ND).sum(1, dtype=torch.int32)


def norms_of_codes(codes_ND: Any, *, block: int = 4096) -> np.ndarray:
    """`squared_norms` of codes (a tensor, or an array that may be a read-only map), int32 [N], a block of
    rows at a time.

    Each block's norms go into one array at once: kept one by one they broke the heap up, to 950 MB for 1e6
    keys.
    """
    norms_N = np.empty(len(codes_ND), np.int32)
    for start in range(0, len(codes_ND), block):
        norms_N[start : start + block] = squared_norms(
            torch.from_numpy(np.array(codes_ND[start : start + block]))
        )
    return norms_N
