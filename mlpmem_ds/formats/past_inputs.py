"""Stored memory inputs of a position and of those before it, side by side, for a memory with a window.

Place in the pipeline: between `keys` and the reader of batches in `train`. Nothing is stored for it: the rows
of the positions before are read from the same mapped files, where most are in the page cache.

n positions, P positions before each, I numbers of an input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlpmem_ds.core.blocks import WindowSequence
from mlpmem_ds.formats.training_windows import StoredKeys


@dataclass(frozen=True, kw_only=True)
class KeysWithPast:
    """Keys whose inputs have those of `past` positions before them, the oldest first: [n, (P + 1) I].

    They are zero before the first position that a window of the base predicts: so whoever runs the base over
    one window at a time (validation, evaluation, keys without inputs) gives the same.
    """

    keys: StoredKeys
    windows: WindowSequence
    """of the corpus: a row of the keys is a position"""
    past: int

    def read(self, array: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `Keys`."""
        return self.keys.read(array, start, stop)

    def read_inputs_ahead(self, start: int, stop: int) -> None:
        """See `Keys`."""
        self.keys.read_inputs_ahead(start, stop)

    def read_inputs(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `Keys`."""
        end = self.windows.num_positions if stop is None else stop
        first = max(0, start - self.past)
        return self._joined(np.arange(start, end), self.keys.read_inputs(first, end), first)

    def gather_inputs(self, positions_n: np.ndarray) -> np.ndarray:
        """See `Keys`."""
        starts_n = self.windows.starts_of(positions_n)
        parts = []
        for steps in range(self.past, -1, -1):
            earlier_n = positions_n - steps
            rows_nI = self.keys.gather_inputs(np.maximum(earlier_n, 0))
            rows_nI[earlier_n < starts_n] = 0
            parts.append(rows_nI)
        return np.concatenate(parts, axis=1)

    def _joined(self, positions_n: np.ndarray, rows_mI: np.ndarray, first: int) -> np.ndarray:
        """Of rows from position `first` on."""
        starts_n = self.windows.starts_of(positions_n)
        parts = []
        for steps in range(self.past, -1, -1):
            earlier_n = positions_n - steps
            rows_nI = rows_mI[np.maximum(earlier_n - first, 0)]  # a copy
            rows_nI[earlier_n < starts_n] = 0
            parts.append(rows_nI)
        return np.concatenate(parts, axis=1)
