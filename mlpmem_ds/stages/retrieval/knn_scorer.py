"""Neighbours → log-probabilities of tokens: a kNN language model (arXiv 1911.00172), for the kNN arms of
`evaluate`.

The weighting is that of the targets, at several temperatures and numbers of neighbours, so that the report
can choose: what the memory learned from and what it is compared with differ in nothing else.

n queries, D width of a state, E size of a stored key, K neighbours, T choices, b rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mlpmem_ds.formats.keys import Codec, Keys
from mlpmem_ds.maths.neighbours import Neighbours
from mlpmem_ds.maths.targets import knn_probability
from mlpmem_ds.maths.weighting import Weighting
from mlpmem_ds.stages.retrieval.neighbour_search import NeighbourSearch, squared_key_distances

# Down to sharp ones: on a real base a T of a few units of d² was best, far below what broad targets store.
TEMPERATURE_FACTORS = (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
NEIGHBOUR_DIVISORS = (1, 4, 16)  # one search serves them: the nearest few are among the nearest many
_ROWS_AT_ONCE = 64  # whose weights are in memory: half a MB at 1,024 neighbours


@dataclass(frozen=True, kw_only=True)
class KnnScorer:
    """A search of stored keys, and what their values say.

    Attributes:
        keys: the keys that `search` goes through, with their values and codec.
        search: how neighbours are found.
        k: neighbours of a query.
        weighting: of the targets; its temperature is the middle one of the `choices`.
    """

    keys: Keys
    search: NeighbourSearch
    k: int
    weighting: Weighting

    @property
    def choices(self) -> tuple[tuple[int, Weighting], ...]:
        """Number of neighbours and weighting of each column of `log_probabilities`; all temperatures for the
        greatest number first."""
        counts = dict.fromkeys(max(1, self.k // divisor) for divisor in NEIGHBOUR_DIVISORS)
        return tuple(
            (count, self.weighting.scaled(factor)) for count in counts for factor in TEMPERATURE_FACTORS
        )

    @property
    def num_bytes(self) -> int:
        """On disk: what is searched, the values, and the codec that makes queries of states."""
        return self.search.num_bytes + self.keys.bytes_of("values", "codec")

    def prepare(self) -> None:
        """Read what all queries need, so that no clock of a few of them counts it; who opened `search` says
        whether keys and values are compared with their checksums elsewhere (verification.py)."""
        self.search.prepare()
        _ = self._codec

    def encode(self, states_nD: np.ndarray) -> np.ndarray:
        """States as the stored keys are read, [n, E]: int8 codes, float16, or float32 with bfloat16's
        values."""
        return self._codec.encode(states_nD)

    def neighbours(self, states_nD: np.ndarray) -> Neighbours:
        """The k nearest keys of each state."""
        return self.search.search(self.encode(states_nD), self.k).unpack()

    def log_probabilities(self, neighbours: Neighbours, tokens_n: np.ndarray) -> np.ndarray:
        """log p_kNN(token) for each of the `choices`, float32 [n, T]; -inf where no neighbour carries the
        token.

        Neighbours are in the order of their distances.
        """
        result_nT = np.empty((len(tokens_n), len(self.choices)), np.float32)
        for start in range(0, len(tokens_n), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            nearest = Neighbours(ids_QK=neighbours.ids_QK[rows], distances_QK=neighbours.distances_QK[rows])
            with np.errstate(divide="ignore"):
                result_nT[rows] = np.log(self._probabilities(nearest, tokens_n[rows]))
        return result_nT

    def _probabilities(self, neighbours: Neighbours, tokens_b: np.ndarray) -> np.ndarray:
        """float64 [b, T]."""
        squared_bK, valid_bK = squared_key_distances(neighbours, self.keys.scale)
        ids_bK = np.maximum(neighbours.ids_QK, 0)
        values_bK = self.keys.gather("values", ids_bK.ravel()).astype(np.int64).reshape(ids_bK.shape)
        values_bK[~valid_bK] = -1
        columns = [
            knn_probability(
                weighting.weights(squared_bK[:, :count], valid_bK[:, :count]), values_bK[:, :count], tokens_b
            )
            for count, weighting in self.choices
        ]
        return np.stack(columns, axis=1)

    @cached_property
    def _codec(self) -> Codec:
        return self.keys.load_codec()
