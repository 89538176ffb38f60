"""Rows of a key directory as one array that stays on disk: what is asked for is read from the mapped files of
its units.

Ranks of one machine share what they read through the page cache; none holds a copy. N positions, E size of a
stored key.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from mlpmem_ds.formats.keys import Keys


class KeyRows:
    """`keys.read("keys")` without reading it: int8 codes, float16 keys, or float32 with the values of
    bfloat16 keys."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self.shape = (keys.num_positions, keys.dim)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Rows [start, stop) or those at any positions, copied to memory."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            return self._keys.read("keys", start, stop)[::step]
        return self._keys.gather("keys", rows)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return self._keys.read("keys", 0, 1).dtype

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize
