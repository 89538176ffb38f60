"""Exact search: each query is compared with all keys, a block of them in memory at a time.

N keys, Q queries, D numbers in a key.
"""

from __future__ import annotations

import numpy as np
import torch

from mlpmem_ds.formats.mapped_keys import MappedKeys
from mlpmem_ds.maths.distances import CPU
from mlpmem_ds.maths.knn import pack_exact_neighbours
from mlpmem_ds.maths.neighbours import Exclusion, PackedNeighbours


class ExactSearch:
    """All keys: rows of key files, or an array [N, D] in memory."""

    def __init__(self, keys_ND: MappedKeys | np.ndarray, device: torch.device = CPU) -> None:
        self._keys_ND, self._device = keys_ND, device

    @property
    def num_bytes(self) -> int:
        keys_ND = self._keys_ND
        return keys_ND.keys.bytes_of("keys") if isinstance(keys_ND, MappedKeys) else keys_ND.nbytes

    def prepare(self) -> None:
        """Compare the key files with their checksums: a flipped byte would be a wrong neighbour in
        silence."""
        if isinstance(self._keys_ND, MappedKeys):
            self._keys_ND.check()

    def search(self, queries_QD: np.ndarray, k: int, exclusion: Exclusion | None = None) -> PackedNeighbours:
        self.prepare()
        return pack_exact_neighbours(queries_QD, self._keys_ND, k, exclusion=exclusion, device=self._device)

    def list_sizes(self, queries_QD: np.ndarray) -> np.ndarray:
        return np.full(len(queries_QD), len(self._keys_ND))
