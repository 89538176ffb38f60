"""Keys (and index) → neighbours of any positions and their distributions, for targets and their audit.

Nothing here holds all keys in memory: exact search takes blocks of the mapped key files, list search the
mapped keys in list order (key_lists.py) once `load` has made them. Before that the keys of the probed lists
are gathered for a few queries at a time: enough for a sample, and nothing is written for it. Both give the
same neighbours, bit for bit for int8 codes.

What is searched is compared with its checksums first: a flipped byte would be a wrong neighbour in silence,
and reading for it (2 GB a second) is nothing beside the search.

N positions, n positions at hand, D numbers in a key, K neighbours, P lists that a query probes, L lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.index_directory import TRAINED_NAME, IndexDirectory
from mlpmem_ds.formats.key_rows import KeyRows
from mlpmem_ds.formats.keys import Keys
from mlpmem_ds.maths.knn import (
    Exclusion,
    Neighbours,
    PackedNeighbours,
    pack_exact_neighbours,
    pack_list_neighbours,
)
from mlpmem_ds.maths.listed_keys import ListedKeys, run_of
from mlpmem_ds.maths.search_blocks import order_of_probes
from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.maths.targets import aggregate, neighbour_weights, truncate
from mlpmem_ds.stages.retrieval.key_lists import make_key_lists

_GATHERED_BYTES = 1 << 28  # of keys of probed lists, before they lie list by list on disk


class Datastore:
    """All keys, with what a position may not find.

    Args:
        keys: the keys, which are the queries too.
        index: whose lists say what a query is compared with; None for all keys.
        k: neighbours of a position.
        nprobe: lists that a query probes.
        window: positions on either side that are no neighbours.
        documents_N: documents whose positions are no neighbours of one another; None where they are.
        threads: of faiss, 0 = as the environment says.
        lists: where `load` finds or makes the keys in list order; None: they are gathered, which is slow for
            many queries.
        world: the ranks that make them together.
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
        lists: Path | None = None,
        world: World | None = None,
    ) -> None:
        self.keys, self.k = keys, k
        self.vectors_ND = KeyRows(keys)
        self._index, self._nprobe, self._window = index, nprobe, window
        self._documents_N, self._threads = documents_N, threads
        self._lists_path, self._world = lists, world or World()
        self._listed: tuple[ListedKeys, np.ndarray] | None = None
        self._checked_units: set[int] = set()

    def load(self) -> None:
        """Load what many queries need: before threads share this, for each would load it by itself."""
        if self._index is None:
            _ = self._checked_keys, self.values_N
            return
        _ = self._trained
        if self._listed is None and self._lists_path is not None:
            self._listed = make_key_lists(self._lists_path, self.keys, self._index, self._world)

    @cached_property
    def values_N(self) -> np.ndarray:
        """The value of each position, copied to memory."""
        self.keys.check("values")
        return self.keys.read("values")

    def values_of(self, positions: np.ndarray) -> np.ndarray:
        """The values of any positions, in the shape of `positions`."""
        if self._listed is not None:
            return self._listed[1][positions]
        if self._index is None or "values_N" in vars(self):
            return self.values_N[positions]
        return self.keys.gather("values", positions.ravel()).reshape(positions.shape)

    def count_values(self) -> np.ndarray:
        """How often each token is a value, int64 [V]."""
        self.keys.check("values")
        counts_V = np.zeros(self.keys.manifest["vocab_size"], np.int64)
        for block in self.keys.blocks:
            counts_V += np.bincount(self.keys.unit("values", block.start), minlength=len(counts_V))
        return counts_V

    def neighbours(self, positions_n: np.ndarray, *, exclude: bool = True) -> Neighbours:
        """The k nearest keys of each of these positions (int64); without `exclude` a position may find
        itself."""
        return self.search(positions_n, exclude=exclude).unpack()

    def search(self, positions_n: np.ndarray, *, exclude: bool = True) -> PackedNeighbours:
        """`neighbours`, to be unpacked in parts."""
        if self._index is None:
            _ = self._checked_keys
            exclusion = self.exclusion(positions_n) if exclude else None
            return pack_exact_neighbours(
                self.vectors_ND[positions_n], self.vectors_ND, self.k, exclusion=exclusion
            )
        if self._listed is None:
            return self._search_gathered(positions_n, exclude)
        self._check_units_of(positions_n)
        queries_nD = self.vectors_ND[positions_n]
        exclusion = self.exclusion(positions_n) if exclude else None
        return pack_list_neighbours(
            queries_nD, self._probes(queries_nD), self._listed[0], self.k, exclusion=exclusion
        )

    def _search_gathered(self, positions_n: np.ndarray, exclude: bool) -> PackedNeighbours:
        """Before the keys lie list by list: those of the probed lists are gathered for some of the positions
        at a time."""
        _ = self._checked_keys
        queries_nD = self.vectors_ND[positions_n]
        probes_nP = self._probes(queries_nD)
        order_n = order_of_probes(probes_nP)
        parts = []
        for part in self._split_by_lists(probes_nP[order_n]):
            rows = order_n[slice(*part)]
            exclusion = self.exclusion(positions_n[rows]) if exclude else None
            lists = self._gathered(probes_nP[rows])
            parts.append(
                pack_list_neighbours(queries_nD[rows], probes_nP[rows], lists, self.k, exclusion=exclusion)
            )
        packed_nK = np.empty((len(positions_n), self.k), np.int64)
        packed_nK[order_n] = np.concatenate([part.packed_QK for part in parts])
        return replace(parts[0], packed_QK=packed_nK)

    def rows(
        self, neighbours: Neighbours, positions_n: np.ndarray, temperature: float, mass: float
    ) -> SparseRows:
        """The distributions of these positions, cut at `mass` but for the position's own value."""
        squared_nK, valid_nK = self.squared_distances(neighbours)
        weights_nK = neighbour_weights(squared_nK, temperature, valid_nK)
        rows = aggregate(weights_nK, self.values_of(np.maximum(neighbours.ids_QK, 0)))
        return truncate(rows, mass, self.values_of(positions_n).astype(np.int64))

    def list_sizes(self, positions_n: np.ndarray) -> np.ndarray:
        """Keys in the list that each position is in, int64 [n]; all keys where there are no lists."""
        if self._index is None:
            return np.full(len(positions_n), self.keys.num_positions)
        return self._sizes_L[self._probes(self.vectors_ND[positions_n])[:, 0]]

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

    @cached_property
    def _trained(self) -> Any:
        from mlpmem_ds.engines import faiss as engine

        assert self._index is not None
        if self._threads:
            engine.set_num_threads(self._threads)
        self._index.check(TRAINED_NAME)
        return engine.read_index(self._index.trained_path, for_search=False)

    @cached_property
    def _shards(self) -> list[Any]:
        """The index's shards, their lists in the files."""
        from mlpmem_ds.engines import faiss as engine

        assert self._index is not None
        self._index.check()
        return [engine.read_index(path, mapped=True) for path in self._index.shard_paths]

    @cached_property
    def _sizes_L(self) -> np.ndarray:
        from mlpmem_ds.engines import faiss as engine

        if self._listed is not None:
            return self._listed[0].sizes_L
        sizes_L: np.ndarray = np.sum([engine.list_sizes(shard) for shard in self._shards], axis=0)
        return sizes_L

    def _split_by_lists(self, probes_nP: np.ndarray) -> Iterator[Block]:
        """Queries [start, stop) whose lists together hold no more keys than may be gathered, at least one
        query."""
        max_keys, start = _GATHERED_BYTES // (self.keys.dim * self.vectors_ND.dtype.itemsize), 0
        while start < len(probes_nP):
            stop, num_keys, is_taken_L = start, 0, np.zeros(len(self._sizes_L), bool)
            while stop < len(probes_nP):
                more = probes_nP[stop][~is_taken_L[probes_nP[stop]]]
                num_keys += int(self._sizes_L[more].sum())
                if num_keys > max_keys and stop > start:
                    break
                is_taken_L[more], stop = True, stop + 1
            yield Block(start, stop)
            start = stop

    def _gathered(self, probes_nP: np.ndarray) -> ListedKeys:
        """The keys of the lists that are probed, in memory; the other lists are empty."""
        from mlpmem_ds.engines import faiss as engine

        sizes_L, ids = np.zeros(len(self._sizes_L), np.int64), [np.empty(0, np.int64)]
        for number in np.unique(probes_nP).tolist():
            ids.append(np.sort(np.concatenate([engine.ids_of_list(shard, number) for shard in self._shards])))
            sizes_L[number] = len(ids[-1])
        ids_M = np.concatenate(ids)
        offsets_L1 = np.concatenate([[0], np.cumsum(sizes_L)])
        run = run_of(0, offsets_L1, ids_M, self.keys.gather("keys", ids_M))
        return ListedKeys(runs=[run], num_keys=self.keys.num_positions)

    def _probes(self, queries_nD: np.ndarray) -> np.ndarray:
        from mlpmem_ds.engines import faiss as engine

        return engine.assign(self._trained, queries_nD, self._nprobe)

    @cached_property
    def _checked_keys(self) -> bool:
        """All key files have been compared with their checksums."""
        self.keys.check("keys")
        return True

    def _check_units_of(self, positions_n: np.ndarray) -> None:
        """Compare the key files that hold these positions with their checksums, each once."""
        if "_checked_keys" in vars(self):
            return
        for unit in (
            set(np.unique(positions_n // self.keys.manifest["unit_positions"]).tolist()) - self._checked_units
        ):
            self.keys.check("keys", self.keys.blocks[unit])
            self._checked_units.add(unit)


def squared_key_distances(neighbours: Neighbours, keys: Keys) -> tuple[np.ndarray, np.ndarray]:
    """(distances² in key units, float64 [n, K]; which are neighbours, bool [n, K])."""
    valid_nK = neighbours.ids_QK >= 0
    return np.where(valid_nK, neighbours.distances_QK, 0).astype(np.float64) * keys.scale**2, valid_nK
