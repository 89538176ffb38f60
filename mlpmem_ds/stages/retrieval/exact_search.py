"""Exact search: each query is compared with all keys, a block of them in memory at a time.

N keys, Q queries, D numbers in a key.
"""

from __future__ import annotations

import logging
from threading import Lock

import numpy as np
import torch

from mlpmem_ds.formats.mapped_keys import MappedKeys
from mlpmem_ds.maths.distances import CPU
from mlpmem_ds.maths.knn import pack_exact_neighbours
from mlpmem_ds.maths.knn_on_device import DeviceKeys, HostKeys, load_keys
from mlpmem_ds.maths.neighbours import Exclusion, PackedNeighbours

_logger = logging.getLogger(__name__)


class ExactSearch:
    """All keys: rows of key files, or an array [N, D] in memory."""

    def __init__(self, keys_ND: MappedKeys | np.ndarray, device: torch.device = CPU) -> None:
        self._keys_ND, self._device = keys_ND, device
        self._loaded: DeviceKeys | HostKeys | None = None
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        keys_ND = self._keys_ND
        return keys_ND.keys.bytes_of("keys") if isinstance(keys_ND, MappedKeys) else keys_ND.nbytes

    def prepare(self) -> None:
        """Compare the key files with their checksums (a flipped byte would be a wrong neighbour in silence),
        and copy the keys to a GPU once, whichever thread comes first."""
        with self._lock:
            if isinstance(self._keys_ND, MappedKeys):
                self._keys_ND.check()
            if self._device.type != "cpu" and self._loaded is None:
                self._loaded = load_keys(self._keys_ND, self._device)
                if isinstance(self._loaded, HostKeys):
                    _logger.warning(
                        "%.1f GB of keys do not fit in half of what is free on %s: they are copied there at"
                        " each batch of exact search; a search by an index, or a GPU with more memory, would"
                        " be faster",
                        self._keys_ND.nbytes / 1e9,
                        self._device,
                    )

    @property
    def mapped(self) -> None:
        return None

    def search(self, queries_QD: np.ndarray, k: int, exclusion: Exclusion | None = None) -> PackedNeighbours:
        self.prepare()
        keys_ND = self._keys_ND if self._loaded is None else self._loaded
        return pack_exact_neighbours(queries_QD, keys_ND, k, exclusion=exclusion, device=self._device)

    def list_sizes(self, queries_QD: np.ndarray) -> np.ndarray:
        return np.full(len(queries_QD), len(self._keys_ND))
