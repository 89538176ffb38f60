"""Keys (and index) → neighbours of any positions and their distributions, for targets and their audit.

What is searched is compared with its checksums when it is loaded: a flipped byte would be a wrong neighbour in silence, and
reading for it (2 GB a second) is nothing beside the search.

N positions, n positions at hand, D numbers in a key, K neighbours, P lists that a query probes, L lists.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from mlpmem_ds.formats.index_directory import IndexDirectory
from mlpmem_ds.formats.keys import Keys
from mlpmem_ds.maths.distances import are_codes, norms_of_codes
from mlpmem_ds.maths.knn import Exclusion, Neighbours, exact_neighbours, list_neighbours
from mlpmem_ds.maths.targets import SparseRows, aggregate, neighbour_weights, truncate


class Datastore:
    """All keys in memory, loaded when first asked, with what a position may not find.

    Args:
        keys: the keys, which are the queries too.
        index: whose lists say what a query is compared with; None for all keys.
        k: neighbours of a position.
        nprobe: lists that a query probes.
        window: positions on either side that are no neighbours.
        documents_N: documents whose positions are no neighbours of one another; None where they are.
        threads: of faiss, 0 = as the environment says.
    """

    def __init__(
        self,
        keys: Keys,
        index: IndexDirectory | None,
        *,
        k: int,
        nprobe: int,
        window: int = 0,
        documents_N: np.ndarray | None = None,
        threads: int = 0,
    ) -> None:
        self.keys, self.k = keys, k
        self._index, self._nprobe, self._window = index, nprobe, window
        self._documents_N, self._threads = documents_N, threads

    @property
    def has_lists(self) -> bool:
        return self._index is not None

    def load(self) -> None:
        """Load everything: before threads share this, for each would load it by itself."""
        _ = self.vectors_ND, self.values_N, self._index is None or (self._lists, self._norms_N)

    @cached_property
    def vectors_ND(self) -> np.ndarray:
        """int8 codes, float16 keys, or float32 with the values of bfloat16 keys."""
        self.keys.check("keys")
        return self.keys.read("keys")

    @cached_property
    def _norms_N(self) -> np.ndarray | None:
        """Squared lengths of int8 codes, int32 [N]."""
        return norms_of_codes(self.vectors_ND) if are_codes(self.vectors_ND) else None

    @cached_property
    def values_N(self) -> np.ndarray:
        self.keys.check("values")
        return self.keys.read("values")

    @cached_property
    def _lists(self) -> tuple[Any, np.ndarray, np.ndarray]:
        """(trained index, offsets of the lists, ids of the lists)."""
        from mlpmem_ds.engines import faiss as engine

        assert self._index is not None
        if self._threads:
            engine.set_num_threads(self._threads)
        self._index.check()
        trained = engine.read_index(self._index.trained_path, for_search=False)
        shards = [engine.read_index(path, for_search=False) for path in self._index.shard_paths]
        return (trained, *engine.inverted_lists(shards))

    def neighbours(self, positions_n: np.ndarray, *, exclude: bool = True) -> Neighbours:
        """The k nearest keys of each of these positions (int64); without `exclude` a position may find itself."""
        exclusion = self.exclusion(positions_n) if exclude else None
        if self._index is None:
            return exact_neighbours(self.vectors_ND[positions_n], self.vectors_ND, self.k, exclusion=exclusion)
        _, offsets_L1, ids_N = self._lists
        probes_nP = self._probes(positions_n)
        # Queries of one list side by side: they probe the same lists, which are then read once for many of them.
        order_n = np.argsort(probes_nP[:, 0], kind="stable")
        positions_n, place_n = positions_n[order_n], np.argsort(order_n)
        found = list_neighbours(
            self.vectors_ND[positions_n],
            probes_nP[order_n],
            offsets_L1,
            ids_N,
            self.vectors_ND,
            self.k,
            exclusion=self.exclusion(positions_n) if exclude else None,
            key_norms_N=self._norms_N,
        )
        return Neighbours(ids_QK=found.ids_QK[place_n], distances_QK=found.distances_QK[place_n])

    def rows(
        self, neighbours: Neighbours, positions_n: np.ndarray, temperature: float, mass: float
    ) -> tuple[SparseRows, np.ndarray]:
        """The distributions of these positions, cut at `mass` but for the position's own value, and what was cut, [n]."""
        squared_nK, valid_nK = self.squared_distances(neighbours)
        weights_nK = neighbour_weights(squared_nK, temperature, valid_nK)
        rows = aggregate(weights_nK, self.values_N[np.maximum(neighbours.ids_QK, 0)])
        return truncate(rows, mass, self.values_N[positions_n].astype(np.int64))

    def list_sizes(self, positions_n: np.ndarray) -> np.ndarray:
        """Keys in the list that each position is in, int64 [n]; all keys where there are no lists."""
        if self._index is None:
            return np.full(len(positions_n), self.keys.num_positions)
        return np.diff(self._lists[1])[self._probes(positions_n)[:, 0]]

    def exclusion(self, positions_n: np.ndarray) -> Exclusion:
        """What these positions may not find: themselves, and what the flags say."""
        documents_N = self._documents_N
        return Exclusion(
            query_ids_Q=positions_n,
            window=self._window,
            key_groups_N=documents_N,
            query_groups_Q=None if documents_N is None else documents_N[positions_n],
        )

    def squared_distances(self, neighbours: Neighbours) -> tuple[np.ndarray, np.ndarray]:
        """(distances² in key units, float64 [n, K]; which are neighbours, bool [n, K])."""
        return squared_key_distances(neighbours, self.keys)

    def _probes(self, positions_n: np.ndarray) -> np.ndarray:
        from mlpmem_ds.engines import faiss as engine

        return engine.assign(self._lists[0], self.vectors_ND[positions_n], self._nprobe)


def squared_key_distances(neighbours: Neighbours, keys: Keys) -> tuple[np.ndarray, np.ndarray]:
    """(distances² in key units, float64 [n, K]; which are neighbours, bool [n, K])."""
    valid_nK = neighbours.ids_QK >= 0
    return np.where(valid_nK, neighbours.distances_QK, 0).astype(np.float64) * keys.scale**2, valid_nK
