"""Index search: what faiss finds by its own codes, in the order of the distances to the stored keys.

The distances of product-quantized codes alone would cost .04 to .19 of total variation in a kNN distribution;
those of the keys, of the same candidates, .007 to .011. The index is held in memory (codes, ids and the
table of distances between centroids and code words), the keys are not.

N keys, Q queries, D numbers in a key, K neighbours.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.engines.faiss_library import set_num_threads
from mlpmem_ds.formats.index_directory import IndexDirectory
from mlpmem_ds.formats.mapped_keys import MappedKeys
from mlpmem_ds.maths.neighbours import Exclusion, PackedNeighbours
from mlpmem_ds.maths.rescoring import rescore


class IndexSearch:
    """The k nearest by the index's distances, rescored."""

    def __init__(
        self,
        keys_ND: MappedKeys,
        index: IndexDirectory,
        *,
        nprobe: int,
        threads: int | None,
        device: torch.device,
    ) -> None:
        self._keys_ND, self._directory, self._nprobe = keys_ND, index, nprobe
        self._threads, self._device = threads, device

    @property
    def num_bytes(self) -> int:
        return self._keys_ND.keys.bytes_of("keys") + self._directory.num_bytes

    def prepare(self) -> None:
        self._keys_ND.check()
        _ = self._index

    @property
    def mapped(self) -> None:
        return None

    def search(self, queries_QD: np.ndarray, k: int, exclusion: Exclusion | None = None) -> PackedNeighbours:
        if exclusion is not None:
            raise ValueError("index search hides no keys from a query: search by lists, or all keys")
        self.prepare()
        _, ids_QK = self._index.search(queries_QD, k, self._nprobe)
        return rescore(queries_QD, ids_QK, self._keys_ND)

    def list_sizes(self, queries_QD: np.ndarray) -> np.ndarray:
        return self._index.list_sizes()[self._index.assign(queries_QD, 1)[:, 0]]

    @cached_property
    def _index(self) -> Index:
        if self._threads is not None:
            set_num_threads(self._threads)
        index = Index.join(Index.read(path, device=self._device) for path in self._directory.shard_paths)
        if len(self._keys_ND) < self._directory.num_vectors:
            index.keep_first(len(self._keys_ND))
        index.prepare_search()
        return index


def bytes_in_memory(index: IndexDirectory, dim: int) -> int:
    """What a search of an index over keys of D numbers holds: what is in its files, and the table that faiss
    makes of them."""
    return index.num_bytes + Index.make(index.factory, dim).table_bytes
