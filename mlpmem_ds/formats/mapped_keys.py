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


class MappedKeys:
    """`keys.read("keys")` without reading it: int8 codes, float16 keys, or float32 with the values of
    bfloat16 keys; the first `num_keys` of them."""

    def __init__(self, keys: Keys, num_keys: int | None = None, *, is_verified: bool = False) -> None:
        self.keys = keys
        self.shape = (keys.num_positions if num_keys is None else num_keys, keys.dim)
        self._is_verified = is_verified

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Rows [start, stop), mapped where they lie in one file, or those at any positions, in memory."""
        if not isinstance(rows, slice):
            return self.keys.gather("keys", rows)
        start, stop, step = rows.indices(len(self))
        size = self.keys.manifest.unit_positions
        first = start // size * size
        if start < stop <= first + size:
            return np.asarray(self.keys.unit("keys", first)[start - first : stop - first : step])
        return self.keys.read("keys", start, stop)[::step]

    def check(self) -> None:
        """Compare the key files of all rows with their checksums, each once; nothing where units of a stage
        have done so.

        Raises:
            DamagedDataError: one has another.
        """
        if not self._is_verified:
            size = self.keys.manifest.unit_positions
            for block in self.keys.blocks[: -(-len(self) // size)]:
                self.keys.check("keys", block)
            self._is_verified = True

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return self.keys.read("keys", 0, 1).dtype

    @property
    def nbytes(self) -> int:
        """Of all rows in memory."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize
