"""Triton twin of `maths.lists_on_device.pack_tiles` for int8 codes: tiles of queries and keys → **packed
candidates**, in one launch for tiles of about one size.

A program takes a tile: some queries that probe a list, times some keys of it. Products, ranks and ids never
leave its registers: of the candidates' memory each number is written once, where torch passes over it a dozen
times.

Shape legend: N keys, B queries of a block, D dimensions, S pairs of a query and a list, T tiles, H hidden
ranges.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEYS = 64
_MIN_PAIRS, _MAX_DIMS = 16, 128
"""tensor cores take no fewer rows; a product of 128 numbers at a time leaves room for a second one"""


@triton.jit
def list_candidates_kernel(  # type: ignore[no-untyped-def]
    queries_ptr,
    keys_ptr,
    norms_ptr,
    key_ids_ptr,
    rows_ptr,
    places_ptr,
    bounds_ptr,
    tiles_ptr,
    candidates_ptr,
    num_tiles,
    num_all_pairs,
    num_dims,
    NUM_RANGES: tl.constexpr,
    ID_BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    KEYS: tl.constexpr,
    DIMS: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(0)
    first_pair = tl.load(tile_ptr)
    num_pairs = tl.load(tile_ptr + num_tiles)
    first_key = tl.load(tile_ptr + 2 * num_tiles)
    num_keys = tl.load(tile_ptr + 3 * num_tiles)
    column = tl.load(tile_ptr + 4 * num_tiles)
    is_pair = tl.arange(0, PAIRS) < num_pairs
    pairs = first_pair + tl.arange(0, PAIRS)
    rows = tl.load(rows_ptr + pairs, mask=is_pair, other=0)
    places = tl.load(places_ptr + pairs, mask=is_pair, other=0) + column
    for start in range(0, num_keys, KEYS):
        steps = start + tl.arange(0, KEYS)
        is_key = steps < num_keys
        keys = first_key + steps
        products = tl.zeros((PAIRS, KEYS), dtype=tl.int32)
        for first_dim in range(0, num_dims, DIMS):
            dims = first_dim + tl.arange(0, DIMS)
            is_dim = dims < num_dims
            left = tl.load(
                queries_ptr + rows[:, None] * num_dims + dims[None, :],
                mask=is_pair[:, None] & is_dim[None, :],
                other=0,
            )
            right = tl.load(
                keys_ptr + keys[None, :] * num_dims + dims[:, None],
                mask=is_key[None, :] & is_dim[:, None],
                other=0,
            )
            products = tl.dot(left, right, products, out_dtype=tl.int32)
        norms = tl.load(norms_ptr + keys, mask=is_key, other=0)
        ids = tl.load(key_ids_ptr + keys, mask=is_key, other=0)
        packed = ((norms[None, :] - 2 * products).to(tl.int64) << ID_BITS) + ids[None, :]
        for number in tl.static_range(NUM_RANGES):
            bound_ptr = bounds_ptr + 2 * number * num_all_pairs + pairs
            first_hidden = tl.load(bound_ptr, mask=is_pair, other=0)
            stop_hidden = tl.load(bound_ptr + num_all_pairs, mask=is_pair, other=0)
            is_hidden = (ids[None, :] >= first_hidden[:, None]) & (ids[None, :] < stop_hidden[:, None])
            packed = tl.where(is_hidden, 9223372036854775807, packed)  # neighbours.MISSING
        tl.store(
            candidates_ptr + places[:, None] + steps[None, :],
            packed,
            mask=is_pair[:, None] & is_key[None, :],
        )


def list_candidates(
    candidates: Tensor,
    *,
    queries_BD: Tensor,
    keys_ND: Tensor,
    norms_N: Tensor,
    ids_N: Tensor,
    rows_S: Tensor,
    places_S: Tensor,
    bounds_HS: Tensor,
    tiles_5T: Tensor,
    max_pairs: int,
    id_bits: int,
) -> None:
    """Write the packed candidates of tiles of at most so many pairs into ``candidates`` (int64, flat).

    A tile is a column of ``tiles_5T``: first pair, pairs, first key, keys, and the number of the first key
    within its list. The candidates of pair s begin at ``places_S[s]``; its query is ``rows_S[s]``, which may
    not find the ids in the ranges [``bounds_HS[2 h, s]``, ``bounds_HS[2 h + 1, s]``). All but codes and norms
    (int32) is int64; every tensor is contiguous.
    """
    pairs = max(_MIN_PAIRS, triton.next_power_of_2(max_pairs))
    num_dims = keys_ND.shape[1]
    with torch.cuda.device_of(candidates):
        list_candidates_kernel[(tiles_5T.shape[1],)](
            queries_BD,
            keys_ND,
            norms_N,
            ids_N,
            rows_S,
            places_S,
            bounds_HS,
            tiles_5T,
            candidates,
            tiles_5T.shape[1],
            len(rows_S),
            num_dims,
            NUM_RANGES=len(bounds_HS) // 2,
            ID_BITS=id_bits,
            PAIRS=pairs,
            KEYS=_KEYS,
            DIMS=max(32, min(_MAX_DIMS, triton.next_power_of_2(num_dims))),
            num_warps=8 if pairs >= 128 else 4,
        )
