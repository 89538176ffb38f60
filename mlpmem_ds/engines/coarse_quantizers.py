"""Coarse quantizers: how the lists near a vector are found, of which the index searches a few.

A kind is a class with the two methods of `CoarseQuantizer`, and a line in `_QUANTIZERS`.

Shape legend: Q queries, D dimensions, L lists, P probed lists of a query.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from mlpmem_ds.engines.faiss_library import faiss
from mlpmem_ds.maths.centroids import CentroidTable, nearest_centroids

Array: TypeAlias = np.ndarray[Any, Any]

_MIN_GRAPH_WIDTH = 64  # nodes that a search of the graph keeps: 16 finds the nearest of 16,384 for 7 of 8
_GRAPH_WIDTH_PER_PROBE = 4


class CoarseQuantizer(Protocol):
    """The centroids of the lists, and how near ones are found."""

    def nearest(self, vectors_QD: Array, count: int) -> tuple[Array, Array]:
        """The `count` nearest centroids of each vector, the nearest first: numbers, int64, and squared
        distances, float32, both [Q, P]; P = min(count, L)."""

    @property
    def num_bytes(self) -> int:
        """Of its part of a file, once it has its centroids."""


class FlatQuantizer:
    """Every vector is compared with every centroid: exact where both are integers."""

    def __init__(self, raw: Any, num_lists: int, device: torch.device) -> None:
        self._raw, self._num_lists, self._device = raw, num_lists, device
        self._made: CentroidTable | None = None
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        return int(self._num_lists * self._raw.d * 4)

    def nearest(self, vectors_QD: Array, count: int) -> tuple[Array, Array]:
        vectors = torch.from_numpy(np.require(vectors_QD, requirements=["C", "W"]))  # copies a read-only map
        return nearest_centroids(vectors, self._table, count)

    @property
    def _table(self) -> CentroidTable:
        """On the device, once for all calls and threads: int8 centroids where that changes none."""
        with self._lock:
            if self._made is None:
                floats = torch.from_numpy(self._raw.reconstruct_n(0, self._num_lists))
                integers = floats.to(torch.int8)
                is_exact = torch.equal(integers.float(), floats)
                self._made = CentroidTable.of((integers if is_exact else floats).to(self._device))
            return self._made


class GraphQuantizer:
    """A graph over the centroids (HNSW, arXiv 1603.09320) leads to near ones: for hundreds of thousands of
    lists, where comparing all costs more than the search itself.

    The nearest may be missed. Vectors are float32 in it; those of int8 codes of up to 260 numbers have exact
    distances, at most 254² · 260 < 2^24.
    """

    def __init__(self, raw: Any, num_lists: int, device: torch.device) -> None:
        self._raw, self._num_lists = raw, num_lists
        self._flat = FlatQuantizer(raw, num_lists, device)

    @property
    def num_bytes(self) -> int:
        """Levels above the first hold about one node in M, with M edges."""
        edges, edges_above = (self._raw.hnsw.nb_neighbors(level) for level in (0, 1))
        nodes_above = 1 / max(1, edges_above - 1)
        return self._flat.num_bytes + int(self._num_lists * (4 * (edges + nodes_above * edges_above) + 12))

    def nearest(self, vectors_QD: Array, count: int) -> tuple[Array, Array]:
        count = min(count, self._num_lists)
        width = max(_MIN_GRAPH_WIDTH, _GRAPH_WIDTH_PER_PROBE * count)
        distances_QP, numbers_QP = self._raw.search(
            np.ascontiguousarray(vectors_QD, dtype=np.float32),
            count,
            params=faiss.SearchParametersHNSW(efSearch=width),
        )
        short = np.flatnonzero((numbers_QP < 0).any(axis=1))  # the graph had fewer within reach
        if len(short):
            numbers_QP[short], distances_QP[short] = self._flat.nearest(vectors_QD[short], count)
        return numbers_QP, distances_QP


_QUANTIZERS: dict[Any, Callable[[Any, int, torch.device], CoarseQuantizer]] = {
    faiss.IndexFlat: FlatQuantizer,
    faiss.IndexHNSWFlat: GraphQuantizer,
}


def open_quantizer(raw: Any, num_lists: int, device: torch.device) -> CoarseQuantizer:
    """The centroids of an inverted file.

    Args:
        raw: faiss's own index over them.
        num_lists: how many it has, or will have.
        device: on which vectors are compared with them.

    Raises:
        ValueError: they are of a kind that is not known here.
    """
    for kind, quantizer in _QUANTIZERS.items():
        if isinstance(raw, kind):
            return quantizer(raw, num_lists, device)
    raise ValueError(
        f"the lists of the factory are those of a {type(raw).__name__}: choose IVF1024 (all centroids"
        " compared) or IVF1024_HNSW32 (through a graph)"
    )
