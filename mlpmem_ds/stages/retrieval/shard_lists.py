"""The inverted lists of an index shard, mapped: of faiss's files, or those without codes."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.formats.index_directory import IndexDirectory
from mlpmem_ds.formats.index_lists import IndexLists


class ShardLists(Protocol):
    """Which keys lie in which list."""

    def list_sizes(self) -> np.ndarray:
        """Keys in each list, int64 [L]."""

    def ids_of_list(self, number: int) -> np.ndarray:
        """Positions of the keys in a list, int64."""


def map_lists(index: IndexDirectory, shard: int) -> ShardLists:
    """The lists of one shard; they stay in its file until they are asked for.

    Raises:
        DamagedDataError: the file cannot be read.
    """
    path = index.shard_paths[shard]
    return Index.read(path, mapped=True) if index.has_codes else IndexLists.map(path, index.num_lists)
