"""Arrays from each rank to each other one, by messages of bytes between two ranks.

In step s a rank sends to the s-th rank after it and receives from the s-th before it, so that no rank is sent
to by several at once. Messages are of bounded size: MPI counts elements in 32 bits.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from mlpmem_ds.engines.collectives.ranks import Array

MESSAGE_BYTES = 1 << 28
_HEADER_BYTES = 256

Swap: TypeAlias = Callable[[Array, int, Array, int], None]
"""swap(outgoing uint8, to rank, incoming uint8, from rank): returns when both have arrived; an empty one is
no message"""


def exchange(parts: Sequence[Array], rank: int, swap: Swap) -> list[Array]:
    """`Ranks.exchange` for the ranks [0, len(parts))."""
    size = len(parts)
    received = list(parts)  # its own part stays as it is
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        received[source] = _swap_array(np.asarray(parts[to], order="C"), to, source, swap)
    return received


def gather(value: Any, rank: int, size: int, swap: Swap) -> list[Any]:
    """`Ranks.gather`."""
    pickled = np.frombuffer(pickle.dumps(value, protocol=5), np.uint8)
    received = exchange([pickled] * size, rank, swap)
    return [value if number == rank else pickle.loads(one.data) for number, one in enumerate(received)]


def slices(length: int, itemsize: int) -> Iterator[slice]:
    """[0, length) in pieces of one message each."""
    step = max(1, MESSAGE_BYTES // itemsize)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _swap_array(array: Array, to: int, source: int, swap: Swap) -> Array:
    incoming_header = np.empty(_HEADER_BYTES, np.uint8)
    swap(_header(array), to, incoming_header, source)
    dtype, shape = json.loads(incoming_header.tobytes().rstrip(b"\0"))
    result = np.empty(shape, np.dtype(dtype))
    outgoing, incoming = (one.reshape(-1).view(np.uint8) for one in (array, result))
    for piece in slices(max(len(outgoing), len(incoming)), 1):
        swap(outgoing[piece], to, incoming[piece], source)
    return result


def _header(array: Array) -> Array:
    assert not array.dtype.hasobject and array.dtype.names is None, f"no plain numbers: {array.dtype}"
    words = json.dumps([array.dtype.str, array.shape]).encode()
    assert len(words) <= _HEADER_BYTES, words
    return np.frombuffer(words.ljust(_HEADER_BYTES, b"\0"), np.uint8).copy()
