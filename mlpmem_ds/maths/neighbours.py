"""Pipeline: distances → **neighbours**: their record, what a query may not find, and how one neighbour is
packed.

A neighbour is *packed* in one int64, ``rank << id_bits | id``, where the rank is the integer distance or the
bit pattern of the non-negative float32 distance (which orders like the float). Packed values have no ties, so
selecting the k least of them gives one answer in any order of arrival, on any device.

Shape legend: Q queries, K neighbours, N keys in all, P probes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

Array: TypeAlias = np.ndarray[Any, Any]

MISSING = np.iinfo(np.int64).max  # packed: no neighbour
NO_BOUND = np.iinfo(np.int32).max  # a rank that every other is at most, and that of a key that is hidden


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Neighbours of each query, in the order (distance, id); those that are missing close the row.

    ``ids_QK`` int64, -1 where missing. ``distances_QK`` squared distances, int64 for int8 codes and float64
    for float keys, the greatest value of the dtype where missing.
    """

    ids_QK: Array
    distances_QK: Array

    def rows(self, rows: slice) -> "Neighbours":
        """Those of some queries."""
        return Neighbours(ids_QK=self.ids_QK[rows], distances_QK=self.distances_QK[rows])


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """What a query may not find: its own id; ids within ``window`` of it; a range of ids of its own (the
    positions of its document), if ranges are given.

    ``query_ids_Q`` integers; ``first_hidden_Q`` and ``stop_hidden_Q`` int64: ids [first, stop) are hidden
    from a query.
    """

    query_ids_Q: Array
    first_hidden_Q: Array | None = None
    stop_hidden_Q: Array | None = None
    window: int = 0

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(
                f"window is {self.window}; it counts positions on either side and must be 0 or more"
            )
        if (self.first_hidden_Q is None) != (self.stop_hidden_Q is None):
            raise ValueError("first_hidden_Q and stop_hidden_Q go together: give both or neither")
        for name, bounds_Q in (("first", self.first_hidden_Q), ("stop", self.stop_hidden_Q)):
            if bounds_Q is not None and len(bounds_Q) != len(self.query_ids_Q):
                raise ValueError(f"{len(bounds_Q)} {name}_hidden_Q for {len(self.query_ids_Q)} query ids")

    def covers(self, query_rows: Array, key_ids: Array) -> Array:
        """True where the key is hidden from the query; rows and ids broadcast against each other."""
        hidden: Array = np.abs(key_ids - self.query_ids_Q[query_rows]) <= self.window
        if self.first_hidden_Q is not None and self.stop_hidden_Q is not None:
            hidden |= (key_ids >= self.first_hidden_Q[query_rows]) & (
                key_ids < self.stop_hidden_Q[query_rows]
            )
        return hidden

    def rows(self, rows: Array) -> "Exclusion":
        """The same for some of the queries."""
        first_Q, stop_Q = self.first_hidden_Q, self.stop_hidden_Q
        return replace(
            self,
            query_ids_Q=self.query_ids_Q[rows],
            first_hidden_Q=None if first_Q is None else first_Q[rows],
            stop_hidden_Q=None if stop_Q is None else stop_Q[rows],
        )

    @property
    def is_self_alone(self) -> bool:
        """Whether a query hides nothing but its own id."""
        return not self.window and self.first_hidden_Q is None


@dataclass(frozen=True, kw_only=True)
class PackedNeighbours:
    """Neighbours as they are found, 8 bytes each: a row holds its packed neighbours in order, then
    MISSING."""

    packed_QK: Array
    id_bits: int
    is_integer: bool

    def unpack(self) -> Neighbours:
        """Ids and distances of all of them; takes the packed array over."""
        packed_QK = self.packed_QK
        missing_QK = packed_QK == MISSING
        ids_QK = packed_QK & ((1 << self.id_bits) - 1)
        ids_QK[missing_QK] = -1
        packed_QK >>= self.id_bits
        distances_QK: Array = packed_QK
        if not self.is_integer:
            distances_QK = packed_QK.astype(np.int32).view(np.float32).astype(np.float64)
        distances_QK[missing_QK] = MISSING if self.is_integer else np.finfo(np.float64).max
        return Neighbours(ids_QK=ids_QK, distances_QK=distances_QK)

    def rows(self, rows: slice) -> Neighbours:
        """Those of some queries, unpacked into arrays of their own."""
        return replace(self, packed_QK=self.packed_QK[rows].copy()).unpack()

    def count(self, rows: slice = slice(None)) -> Array:
        """Neighbours of each query, or of some queries, int64 [Q]."""
        return np.count_nonzero(self.packed_QK[rows] != MISSING, axis=1)

    def shifted(self, first: int) -> "PackedNeighbours":
        """The same with ids that are greater by ``first``: of keys that were searched as a part of many."""
        packed_QK = self.packed_QK
        return replace(self, packed_QK=np.where(packed_QK == MISSING, MISSING, packed_QK + first))


def merge_neighbours(parts: Sequence[PackedNeighbours]) -> PackedNeighbours:
    """The K nearest of all parts of each query, in the order (distance, id).

    Each part has the K nearest (or MISSING) of the same queries among other keys; all ids are those of one
    set of keys. Raises ValueError where the parts are not of one kind and shape.
    """
    first = parts[0]
    for part in parts[1:]:
        if (part.id_bits, part.is_integer) != (first.id_bits, first.is_integer):
            raise ValueError("neighbours of keys of another type or size cannot be merged")
        if part.packed_QK.shape != first.packed_QK.shape:
            raise ValueError(f"neighbours of shapes {first.packed_QK.shape} and {part.packed_QK.shape}")
    k = first.packed_QK.shape[1]
    packed_QW = np.concatenate([part.packed_QK for part in parts], axis=1)
    packed_QW.sort(axis=1)
    return replace(first, packed_QK=np.ascontiguousarray(packed_QW[:, :k]))


def check_search(
    queries_QD: Array | Tensor,
    num_dims: int,
    num_keys: int,
    k: int,
    exclusion: Exclusion | None,
    is_integer: bool,
) -> int:
    """Refuse what cannot be searched; return how many bits of a packed value hold the id."""
    if k < 1:
        raise ValueError(f"k is {k}; ask for at least 1 neighbour")
    if queries_QD.shape[1] != num_dims:
        raise ValueError(f"queries have {queries_QD.shape[1]} dimensions, keys {num_dims}")
    if exclusion is not None and len(exclusion.query_ids_Q) != len(queries_QD):
        raise ValueError(
            f"exclusion names {len(exclusion.query_ids_Q)} query ids for {len(queries_QD)} queries"
        )
    id_bits = 63 - ((num_dims * 255**2).bit_length() if is_integer else 31)
    if num_keys >= 2**id_bits:
        raise ValueError(
            f"{num_keys} keys of {num_dims} dimensions; at most {2**id_bits - 1} ids can be told apart"
        )
    return id_bits


def check_probes(probes_QP: Array, num_queries: int, num_lists: int) -> None:
    """Raises ValueError unless ``probes_QP`` has a row a query, of different list numbers (-1: none)."""
    if len(probes_QP) != num_queries:
        raise ValueError(f"{len(probes_QP)} rows of probes for {num_queries} queries")
    if probes_QP.size and (probes_QP.max() >= num_lists or probes_QP.min() < -1):
        raise ValueError(
            f"probes lie in [{probes_QP.min()}, {probes_QP.max()}]; there are {num_lists} lists, and -1 is"
            " none"
        )
    sorted_QP = np.sort(probes_QP, axis=1)
    if ((sorted_QP[:, 1:] == sorted_QP[:, :-1]) & (sorted_QP[:, 1:] >= 0)).any():
        raise ValueError(
            "a query probes one list twice, which would give it the same neighbour twice; drop repeated"
            " probes"
        )
