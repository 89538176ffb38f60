"""Inverted lists without codes: which keys lie in which list of an index shard, and nothing else.

One array a shard, uint32 (int64 above 2^32 positions): L + 1 offsets, then the positions of the shard list
after list, ascending within a list; list l is the positions [offsets[l], offsets[l + 1]). README.md specifies
it.

Shape legend: N keys of the shard, L lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlpmem_ds.core.errors import DamagedDataError


@dataclass(frozen=True, kw_only=True)
class IndexLists:
    """The lists of a shard: offsets [L + 1] and positions [N], in memory or mapped."""

    offsets_L1: np.ndarray
    positions_N: np.ndarray

    @classmethod
    def from_numbers(cls, numbers_N: np.ndarray, positions_N: np.ndarray, num_lists: int) -> IndexLists:
        """From the list of each key; positions ascend."""
        sizes_L = np.bincount(numbers_N, minlength=num_lists)
        offsets_L1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes_L)])
        return cls(offsets_L1=offsets_L1, positions_N=positions_N[np.argsort(numbers_N, kind="stable")])

    @classmethod
    def map(cls, path: Path, num_lists: int) -> IndexLists:
        """Those of a file, mapped.

        Raises:
            DamagedDataError: it is no such array.
        """
        try:
            stored = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise DamagedDataError(f"{path} is no array of lists ({error}): build the index again") from error
        lists = cls(offsets_L1=stored[: num_lists + 1], positions_N=stored[num_lists + 1 :])
        if len(lists.offsets_L1) <= num_lists or lists.offsets_L1[-1] != len(lists.positions_N):
            raise DamagedDataError(f"{path} does not hold {num_lists} lists: build the index again")
        return lists

    def packed(self, num_positions: int) -> np.ndarray:
        """The array of the file; `num_positions` of all shards decides its dtype."""
        dtype = np.uint32 if num_positions < 2**32 else np.int64
        return np.concatenate([self.offsets_L1, self.positions_N]).astype(dtype)

    def list_sizes(self) -> np.ndarray:
        """Keys in each list, int64 [L]."""
        return np.diff(self.offsets_L1.astype(np.int64))

    def ids_of_list(self, number: int) -> np.ndarray:
        """Positions of the keys in a list, int64, ascending."""
        start, stop = self.offsets_L1[number : number + 2].tolist()
        return self.positions_N[start:stop].astype(np.int64)


def bytes_of_lists(num_positions: int, num_lists: int, num_shards: int) -> int:
    """Of the files of all shards."""
    size = 4 if num_positions < 2**32 else 8
    return size * (num_positions + num_shards * (num_lists + 1))
