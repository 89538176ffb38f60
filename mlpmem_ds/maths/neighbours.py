"""Pipeline: distances → **neighbours**: their record, what a query may not find, and how one neighbour is
packed.

A neighbour is *packed* in one int64, ``rank << id_bits | id``, where the rank is the integer distance or the
bit pattern of the non-negative float32 distance (which orders like the float). Packed values have no ties, so
selecting the k least of them gives one answer in any order of arrival, on any device.

Shape legend: Q queries, K neighbours, N keys in all, P probes.
"""

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


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """What a query may not find: its own id; ids within ``window`` of it; keys of its own group (document),
    if groups are given.

    ``query_ids_Q``, ``query_groups_Q`` and ``key_groups_N`` are integers; key n has id n and group
    ``key_groups_N[n]``.
    """

    query_ids_Q: Array
    query_groups_Q: Array | None = None
    key_groups_N: Array | None = None
    window: int = 0

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(
                f"window is {self.window}; it counts positions on either side and must be 0 or more"
            )
        if (self.query_groups_Q is None) != (self.key_groups_N is None):
            raise ValueError("query_groups_Q and key_groups_N go together: give both or neither")
        if self.query_groups_Q is not None and len(self.query_groups_Q) != len(self.query_ids_Q):
            raise ValueError(f"{len(self.query_groups_Q)} query groups for {len(self.query_ids_Q)} query ids")

    def covers(self, query_rows: Array, key_ids: Array) -> Array:
        """True where the key is hidden from the query; rows and ids broadcast against each other."""
        hidden: Array = np.abs(key_ids - self.query_ids_Q[query_rows]) <= self.window
        if self.query_groups_Q is not None and self.key_groups_N is not None:
            hidden |= self.key_groups_N[key_ids] == self.query_groups_Q[query_rows]
        return hidden

    def rows(self, rows: Array) -> "Exclusion":
        """The same for some of the queries."""
        groups_Q = self.query_groups_Q
        return replace(
            self,
            query_ids_Q=self.query_ids_Q[rows],
            query_groups_Q=None if groups_Q is None else groups_Q[rows],
        )

    @property
    def is_self_alone(self) -> bool:
        """Whether a query hides nothing but its own id."""
        return not self.window and self.query_groups_Q is None


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

    def count(self) -> Array:
        """Neighbours of each query, int64 [Q]."""
        return np.count_nonzero(self.packed_QK != MISSING, axis=1)


def merge_neighbours(first: Neighbours, second: Neighbours, k: int) -> Neighbours:
    """The k nearest of both, in the order (distance, id); each is in that order, and `second`'s ids are the
    greater."""
    ids_QW = np.concatenate([first.ids_QK, second.ids_QK], axis=1)
    distances_QW = np.concatenate([first.distances_QK, second.distances_QK], axis=1)
    order_QK = np.argsort(distances_QW, axis=1, kind="stable")[:, :k]
    return Neighbours(
        ids_QK=np.take_along_axis(ids_QW, order_QK, axis=1),
        distances_QK=np.take_along_axis(distances_QW, order_QK, axis=1),
    )


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
    if (
        exclusion is not None
        and exclusion.key_groups_N is not None
        and len(exclusion.key_groups_N) != num_keys
    ):
        raise ValueError(f"exclusion has {len(exclusion.key_groups_N)} key groups for {num_keys} keys")
    id_bits = 63 - ((num_dims * 255**2).bit_length() if is_integer else 31)
    if num_keys >= 2**id_bits:
        raise ValueError(
            f"{num_keys} keys of {num_dims} dimensions; at most {2**id_bits - 1} ids can be told apart"
        )
    return id_bits


def check_probes(probes_QP: Array, num_queries: int, num_lists: int) -> None:
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
