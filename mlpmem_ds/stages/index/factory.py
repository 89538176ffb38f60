"""Part of `build_index`: which faiss factory fits so many keys, and what training it costs."""

from __future__ import annotations

import math
import re

import numpy as np
import torch

from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.formats.index_directory import has_codes
from mlpmem_ds.formats.index_lists import bytes_of_lists
from mlpmem_ds.maths.distances import CPU
from mlpmem_ds.maths.kmeans import ITERATIONS, TWO_LEVEL_ABOVE

_MIN_POINTS_PER_CENTROID = 39
_MIN_KEYS_PER_LIST = 192
_ID_BYTES = 8
_MIN_SHARDS = 4
_MIN_KEYS_OF_SHARD, _KEYS_OF_SHARD_PER_LIST = 1 << 20, 128


def choose_factory(num_vectors: int, dim: int, memory_bytes: int | None = None) -> tuple[str, str]:
    """The factory string for N vectors of D dimensions in this memory (None: enough), and the reason in
    words.

    Lists: the power of two nearest to 4·sqrt(N), but at least 192 keys a list, so that 64 training points a
    list are at most a third of the keys. Codes: one byte for each 4 dimensions, or for up to 16 while the
    index would fill more than half of the memory; where no such number of bytes divides D, the next greater
    one that does. Half a byte, or the vector itself, where there are too few keys to train a product
    quantizer.
    """
    usual = 2 ** round(np.log2(4 * np.sqrt(max(num_vectors, 1))))
    max_lists = max(1, num_vectors // _MIN_KEYS_PER_LIST)
    num_lists = min(usual, 2 ** (max_lists.bit_length() - 1))
    reason = f"{num_vectors:,} keys: {num_lists} lists of {num_vectors / num_lists:.0f} keys"
    bits = next((bits for bits in (8, 4) if num_vectors >= _MIN_POINTS_PER_CENTROID * 2**bits), 0)
    if not bits:
        return f"IVF{num_lists},Flat", f"{reason}; too few to train a product quantizer, so whole vectors"
    most, least = max(1, dim // 4), -(-dim // 16)
    divisors = [parts for parts in range(most, least - 1, -1) if dim % parts == 0]
    remark = "" if divisors else f", which has no divisor from {least} to {most}"
    divisors = divisors or [next(parts for parts in range(most, dim + 1) if dim % parts == 0)]
    parts = divisors[0]
    if memory_bytes is not None:
        fitting = (
            parts for parts in divisors if 2 * num_vectors * (parts * bits // 8 + _ID_BYTES) <= memory_bytes
        )
        parts = next(fitting, divisors[-1])
        if parts != divisors[0]:
            reason += (
                f"; {divisors[0]} bytes a key would fill more than half of {memory_bytes / 1e9:.1f} GB of"
                " memory"
            )
    suffix = "" if bits == 8 else f"x{bits}"
    return (
        f"IVF{num_lists},PQ{parts}{suffix}",
        f"{reason}; {bits} bits for each {dim // parts} of {dim} dimensions{remark}",
    )


def resolve_factory(factory: str, num_vectors: int, dim: int, memory_bytes: int | None) -> tuple[str, str]:
    """(factory string, reason in words): `auto` is chosen, `lists` too, but without the code."""
    if factory not in ("auto", "lists"):
        return factory, "as asked"
    chosen, reason = choose_factory(num_vectors, dim, memory_bytes)
    if factory == "auto":
        return chosen, reason
    return chosen.rpartition(",")[0], f"{reason.partition(';')[0]}; without codes"


def choose_num_shards(num_vectors: int, num_lists: int) -> int:
    """The number of shards, a function of the keys and the lists alone, so that the bytes of an index do not
    depend on how many ranks built it.

    A shard is filled in the memory of one rank, and a kill costs that much work; it repeats the centroids, 4
    bytes a dimension, so that with 128 keys a list they are a tenth of it: 24 shards of 1e8 keys, 150 of 5e9
    (2.4 GB each as PQ64), 746 of 2e11.
    """
    keys_of_shard = max(_MIN_KEYS_OF_SHARD, _KEYS_OF_SHARD_PER_LIST * num_lists)
    return max(_MIN_SHARDS, -(-num_vectors // keys_of_shard))


def make_index(factory: str, dim: int, num_vectors: int, device: torch.device = CPU) -> Index:
    """The empty index of a factory that N vectors of D dimensions can train, on a device.

    A factory without a code (`IVF1024`) gives the one whose lists are stored alone; in faiss it has whole
    vectors, which are never filled in.

    Raises:
        ValueError: with the remedy.
    """
    lists = re.search(r"IVF(\d+)", factory)
    if lists and int(lists[1]) == 0:
        raise ValueError(f"factory {factory!r} has no lists: choose one or more (IVF…), or auto")
    needed = 0 if lists is None else int(lists[1])
    index = None
    if needed <= num_vectors:  # else so many lists are not made first
        index = Index.make(factory if has_codes(factory) else f"{factory},Flat", dim, device)
        needed = index.min_training_vectors
    if index is None or num_vectors < needed:
        raise ValueError(
            f"factory {factory!r} needs at least {needed:,} keys to train and there are {num_vectors:,}: "
            "choose fewer lists (IVF…) or fewer bits (PQ…x4), or auto"
        )
    return index


def index_bytes(factory: str, dim: int, num_vectors: int, num_shards: int) -> int:
    """Of an index directory."""
    index = make_index(factory, dim, num_vectors)
    if has_codes(factory):
        return index.num_bytes(num_vectors, num_shards + 1)
    return index.num_bytes(0, 1) + bytes_of_lists(num_vectors, index.num_lists, num_shards)


def training_operations(index: Index, num_positions: int, dim: int) -> float:
    """Operations of the coarse k-means: two a product, in one level, or in two of about the square root of
    the lists."""
    points = min(num_positions, index.num_training_vectors)
    is_one_level = index.num_lists <= TWO_LEVEL_ABOVE
    compared = index.num_lists if is_one_level else 2 * math.isqrt(index.num_lists)
    return 2.0 * ITERATIONS * points * compared * dim
