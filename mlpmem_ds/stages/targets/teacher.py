"""Part of `write_targets`: what the memory will imitate. Each position's neighbours among all keys, as a
distribution over their values.

The queries are the stored keys themselves, and a position never finds itself.

n positions, N all positions, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mlpmem_ds.core.blocks import split_blocks
from mlpmem_ds.formats.counted_rows import CountedRows
from mlpmem_ds.formats.keys import Keys
from mlpmem_ds.formats.mapped_keys import MappedKeys
from mlpmem_ds.maths.neighbours import Exclusion, Neighbours, PackedNeighbours
from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.maths.targets import aggregate, truncate
from mlpmem_ds.maths.weighting import Weighting
from mlpmem_ds.stages.retrieval.neighbour_search import NeighbourSearch, squared_key_distances

_NEIGHBOURS_AT_ONCE = 1 << 18  # whose weights are added up: they stay in the cache


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The positions of a key directory, a search of their keys, and what a position may not find.

    Attributes:
        keys: the keys that `search` goes through, with their values.
        search: how neighbours are found.
        k: neighbours of a position.
        window: positions on either side that are no neighbours.
        documents: the rows of the text, where those of one document are no neighbours of one another; None
            where they are.
    """

    keys: Keys
    search: NeighbourSearch
    k: int
    window: int = 0
    documents: CountedRows | None = None

    def prepare(self) -> None:
        """Make and read what many positions need, before threads share this."""
        self.search.prepare()
        if self.search.mapped is None:
            _ = self._values_N

    def find(self, positions_n: np.ndarray, *, exclude: bool = True) -> PackedNeighbours:
        """The k nearest keys of each of these positions (int64); without `exclude` a position may find
        itself."""
        exclusion = self._exclusion(positions_n) if exclude else None
        return self.search.search(self._queries_ND[positions_n], self.k, exclusion)

    def rows(
        self, neighbours: Neighbours, positions_n: np.ndarray, weighting: Weighting, mass: float
    ) -> SparseRows:
        """The distributions of these positions, cut at `mass` but for the position's own value. Some rows at
        a time: the arrays at work take four times the memory of the neighbours that they are made of."""
        own_values_n = self.values_of(positions_n).astype(np.int64)
        rows_at_once = max(1, _NEIGHBOURS_AT_ONCE // neighbours.ids_QK.shape[1])
        parts = [
            truncate(self.whole_rows(neighbours.rows(rows), weighting), mass, own_values_n[rows])
            for rows in (slice(*block) for block in split_blocks(len(positions_n), rows_at_once))
        ]
        return SparseRows.join(parts) if parts else SparseRows.empty(0)

    def whole_rows(self, neighbours: Neighbours, weighting: Weighting) -> SparseRows:
        """The distributions of these neighbours' values, nothing cut."""
        weights_nK = weighting.weights(*self.squared_distances(neighbours))
        return aggregate(weights_nK, self.values_of(np.maximum(neighbours.ids_QK, 0)))

    def squared_distances(self, neighbours: Neighbours) -> tuple[np.ndarray, np.ndarray]:
        """(distances² in key units, float64 [n, K]; which are neighbours, bool [n, K])."""
        return squared_key_distances(neighbours, self.keys.scale)

    def list_sizes(self, positions_n: np.ndarray) -> np.ndarray:
        """Keys in the list that each position falls in, int64 [n]; all keys where there are no lists."""
        return self.search.list_sizes(self._queries_ND[positions_n])

    def values_of(self, positions: np.ndarray) -> np.ndarray:
        """The values of any positions, in the shape of `positions`."""
        if self.search.mapped is not None:
            return self.search.mapped.values_of(positions)
        if "_values_N" in vars(self):
            return self._values_N[positions]
        return self.keys.gather("values", positions.ravel()).reshape(positions.shape)

    def count_values(self) -> np.ndarray:
        """How often each token id is a value, int64 [V]."""
        if self.search.mapped is not None:
            counts_V: np.ndarray = np.sum(self.search.mapped.counts, axis=0)
            return counts_V
        counts_V = np.zeros(self.keys.manifest.vocab_size, np.int64)
        for block in self.keys.blocks:
            counts_V += np.bincount(self.keys.unit("values", block.start), minlength=len(counts_V))
        return counts_V

    @cached_property
    def _queries_ND(self) -> MappedKeys:
        return MappedKeys(self.keys)

    @cached_property
    def _values_N(self) -> np.ndarray:
        """The value of each position, in memory: with exact search of all keys."""
        return self.keys.read("values")

    def _exclusion(self, positions_n: np.ndarray) -> Exclusion:
        bounds = (None, None) if self.documents is None else self.documents.document_bounds(positions_n)
        return Exclusion(
            query_ids_Q=positions_n, window=self.window, first_hidden_Q=bounds[0], stop_hidden_Q=bounds[1]
        )
