"""The kNN-LM beside the memory: stored keys, an index where there is one, and the probability that neighbours
give a value.

Used by `evaluate` for the arms base+knn_exact and base+knn_ivfpq. Keys and values of the whole datastore are
held in memory, N · E bytes for int8 keys.

n queries, N stored keys, E size of a stored key, K neighbours, T choices of neighbours and temperature, b
rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from mlpmem_ds.formats.index_directory import IndexDirectory
from mlpmem_ds.formats.keys import Codec, Keys
from mlpmem_ds.maths.knn import Neighbours, exact_neighbours
from mlpmem_ds.maths.targets import knn_probability, neighbour_weights
from mlpmem_ds.models.backbone import CapturePoint
from mlpmem_ds.stages.report.summary import KNN_EXACT, KNN_IVFPQ

TEMPERATURE_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
NEIGHBOUR_DIVISORS = (1, 4, 16)  # one search serves them: the nearest few are among the nearest many
# Numbers of gathered keys at hand: 1 MB as float32; what leaves the cache takes twice as long.
_RESCORE_ELEMENTS = 1 << 18
_NORM_ROWS = 1 << 13
_WEIGHED_ROWS = 64  # whose weights are at hand: half a MB at 1,024 neighbours


@dataclass(frozen=True, kw_only=True)
class Retriever:
    """The keys, and the index where one was given; arrays are read when first needed and stay in memory."""

    keys: Keys
    index: IndexDirectory | None
    k: int
    nprobe: int
    temperature: float
    exact: bool
    point: CapturePoint

    @property
    def choices(self) -> tuple[tuple[int, float], ...]:
        """Neighbours and temperature of each column of `log_probabilities`; all temperatures for the most
        neighbours first."""
        counts = dict.fromkeys(max(1, self.k // divisor) for divisor in NEIGHBOUR_DIVISORS)
        return tuple((count, self.temperature * factor) for count in counts for factor in TEMPERATURE_FACTORS)

    @property
    def arms(self) -> list[str]:
        return [KNN_EXACT] * self.exact + [KNN_IVFPQ] * (self.index is not None)

    @cached_property
    def stored_NE(self) -> np.ndarray:
        return self.keys.read("keys")

    @cached_property
    def values_N(self) -> np.ndarray:
        return self.keys.read("values").astype(np.int64)

    @cached_property
    def codec(self) -> Codec:
        return self.keys.load_codec()

    @cached_property
    def norms_N(self) -> np.ndarray:
        return squared_norms(self.stored_NE)

    @cached_property
    def joined_index(self) -> Any:
        return self._read_index()

    def _read_index(self) -> Any:
        from mlpmem_ds.engines import faiss as engine

        assert self.index is not None
        return engine.join([engine.read_index(path) for path in self.index.shard_paths])

    def first(self, num_keys: int) -> Retriever:
        """A retriever over the first keys only, ready to search: for measuring speed against size."""
        from mlpmem_ds.engines import faiss as engine

        part = replace(self)
        # What is cached is put in place; the keys' arrays are views.
        vars(part).update(
            stored_NE=self.stored_NE[:num_keys], values_N=self.values_N[:num_keys], codec=self.codec
        )
        if self.index is not None:
            index = engine.keep_first(self._read_index(), num_keys)
            vars(part).update(norms_N=self.norms_N[:num_keys], joined_index=index)
        return part

    def num_bytes(self, arm: str) -> int:
        """On disk: keys, values and codec; and the index for the arm that searches it."""
        parts = ("keys-", "values-", "codec/")
        size = sum(entry["bytes"] for entry in self.keys.manifest["files"] if entry["name"].startswith(parts))
        return size + (self.index.num_bytes if arm == KNN_IVFPQ and self.index is not None else 0)

    def load(self, arm: str) -> None:
        """Read what stays in memory from one unit to the next, so that no unit's clock counts it."""
        _ = self.stored_NE, self.values_N, self.codec
        if arm == KNN_IVFPQ:
            _ = self.norms_N, self.joined_index

    def encode(self, states_nD: np.ndarray) -> np.ndarray:
        """States as the stored keys are read: int8 codes, float16, or float32 with bfloat16's values."""
        return self.codec.encode(states_nD)

    def search(self, arm: str, queries_nE: np.ndarray) -> Neighbours:
        if arm == KNN_EXACT:
            return exact_neighbours(queries_nE, self.stored_NE, self.k, exclusion=None)
        from mlpmem_ds.engines import faiss as engine

        _, ids_nK = engine.search([self.joined_index], queries_nE, self.k, self.nprobe)
        return Neighbours(
            ids_QK=ids_nK, distances_QK=rescore(queries_nE, ids_nK, self.stored_NE, self.norms_N)
        )

    def log_probabilities(self, neighbours: Neighbours, values_n: np.ndarray) -> np.ndarray:
        """log p_kNN(value) for each of the `choices`, float32 [n, T]; -inf where no neighbour carries the
        value."""
        result_nT = np.empty((len(values_n), len(self.choices)), np.float32)
        for start in range(0, len(values_n), _WEIGHED_ROWS):
            rows = slice(start, start + _WEIGHED_ROWS)
            probabilities_bT = self._probabilities(
                neighbours.ids_QK[rows], neighbours.distances_QK[rows], values_n[rows]
            )
            with np.errstate(divide="ignore"):
                result_nT[rows] = np.log(probabilities_bT)
        return result_nT

    def _probabilities(
        self, ids_bK: np.ndarray, distances_bK: np.ndarray, values_b: np.ndarray
    ) -> np.ndarray:
        order_bK = np.argsort(distances_bK, axis=1, kind="stable")  # a missing one has the greatest
        ids_bK, distances_bK = (
            np.take_along_axis(array_bK, order_bK, axis=1) for array_bK in (ids_bK, distances_bK)
        )
        valid_bK = ids_bK >= 0
        values_bK = np.where(valid_bK, self.values_N[ids_bK], -1)
        squared_bK = np.where(valid_bK, distances_bK, 0).astype(np.float64) * self.codec.scale**2
        columns = [
            knn_probability(
                neighbour_weights(squared_bK[:, :count], temperature, valid_bK[:, :count]),
                values_bK[:, :count],
                values_b,
            )
            for count, temperature in self.choices
        ]
        return np.stack(columns, axis=1)


def squared_norms(rows_NE: np.ndarray) -> np.ndarray:
    """Squared length of each row: int64 and exact for int8, else float64."""
    dtype = _distance_dtype(rows_NE)
    norms_N = np.empty(len(rows_NE), dtype)
    for start in range(0, len(rows_NE), _NORM_ROWS):
        block: Any = rows_NE[start : start + _NORM_ROWS].astype(np.int32 if dtype == np.int64 else np.float64)
        norms_N[start : start + _NORM_ROWS] = (block * block).sum(axis=1)
    return norms_N


def rescore(
    queries_nE: np.ndarray, ids_nK: np.ndarray, stored_NE: np.ndarray, norms_N: np.ndarray
) -> np.ndarray:
    """Squared distances of each query to the stored keys of these ids [n, K]: int64 and exact for int8, else
    float64.

    `norms_N` are the stored keys' `squared_norms`. Missing ids (-1) get the greatest value of the dtype.
    """
    dtype = _distance_dtype(stored_NE)
    stored, ids, query_norms_n = (
        torch.from_numpy(stored_NE),
        torch.from_numpy(ids_nK),
        squared_norms(queries_nE),
    )
    distances_nK = np.empty(ids_nK.shape, dtype)
    step = max(1, _RESCORE_ELEMENTS // max(1, ids_nK.shape[1] * stored_NE.shape[1]))
    for start in range(0, len(ids_nK), step):
        rows = slice(start, start + step)
        ids_bK = ids[rows].clamp(min=0)
        # index_select, for plain indexing takes seven times as long.
        keys_bKE = stored.index_select(0, ids_bK.reshape(-1)).float().view(*ids_bK.shape, -1)
        # Products of int8 codes of up to 1,040 numbers: their float32 sums are exact integers, at most 2^24.
        products_bK = (
            (keys_bKE @ torch.from_numpy(queries_nE[rows]).float()[:, :, None])[:, :, 0].numpy().astype(dtype)
        )
        distances_nK[rows] = norms_N[ids_bK.numpy()] - 2 * products_bK + query_norms_n[rows, None]
    greatest = np.iinfo(dtype).max if dtype == np.int64 else np.finfo(dtype).max
    return np.where(ids_nK >= 0, distances_nK.clip(min=0), greatest)


def _distance_dtype(vectors: np.ndarray) -> np.dtype[Any]:
    return np.dtype(np.int64 if vectors.dtype == np.int8 else np.float64)
