"""Pipeline: keys and index → **keys list by list** → neighbours. What a search through inverted lists reads.

The keys of a list lie side by side, in the order of their ids, so that a search multiplies with a slice of an
array (often a memory map that the ranks of a machine share) where it would gather rows one by one. A large
datastore is written in runs of positions; a list is then one slice of each run.

Shape legend: R runs, L lists, N keys of a run, K keys of a list, D dimensions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mlpmem_ds.maths.distances import are_codes, norms_of_codes

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class ListedRun:
    """Some keys in the order (list, id): those of list l are rows ``offsets_L1[l]:offsets_L1[l + 1]``.

    ``ids_N`` integers, the id less ``first``; ``keys_ND`` a tensor; ``norms_N`` int32, the `squared_norms` of
    int8 codes, None for float keys.
    """

    first: int
    offsets_L1: Array
    ids_N: Array
    keys_ND: Tensor
    norms_N: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class ListedKeys:
    """Keys list by list, in runs of ascending ids; all ids are below ``num_keys``."""

    runs: Sequence[ListedRun]
    num_keys: int

    @property
    def num_dims(self) -> int:
        return self.runs[0].keys_ND.shape[1]

    @property
    def num_bytes(self) -> int:
        """Of the keys alone."""
        return sum(run.keys_ND.nbytes for run in self.runs)

    @property
    def dtype(self) -> torch.dtype:
        return self.runs[0].keys_ND.dtype

    @cached_property
    def sizes_L(self) -> Array:
        """Keys in each list, int64."""
        sizes_RL = np.array([np.diff(run.offsets_L1) for run in self.runs], np.int64)
        sizes_L: Array = sizes_RL.sum(axis=0)
        return sizes_L

    def ids_of(self, number: int) -> Array:
        """Ids of a list, int64 [K], ascending."""
        if len(self.runs) == 1:
            run = self.runs[0]
            return run.ids_N[run.offsets_L1[number] : run.offsets_L1[number + 1]] + np.int64(run.first)
        parts = [run.ids_N[rows] + np.int64(run.first) for run, rows in self._slices(number)]
        return np.concatenate(parts)

    def keys_of(self, number: int) -> tuple[Tensor, Tensor | None]:
        """(keys [K, D], norms int32 [K] or None) of a list: views where there is one run."""
        if len(self.runs) == 1:
            run, rows = self._slices(number)[0]
            return run.keys_ND[rows], None if run.norms_N is None else run.norms_N[rows]
        keys, norms = [], []
        for run, rows in self._slices(number):
            keys.append(run.keys_ND[rows])
            if run.norms_N is not None:
                norms.append(run.norms_N[rows])
        return torch.cat(keys), torch.cat(norms) if norms else None

    def _slices(self, number: int) -> list[tuple[ListedRun, slice]]:
        return [
            (run, slice(int(run.offsets_L1[number]), int(run.offsets_L1[number + 1]))) for run in self.runs
        ]


def in_list_order(keys_ND: Array, offsets_L1: Array, ids_N: Array) -> ListedKeys:
    """Keys in memory list by list, from those in the order of their ids (key n has id n); list l has the ids
    ``ids_N[offsets_L1[l]:offsets_L1[l + 1]]``, in any order."""
    lists_N = np.repeat(np.arange(len(offsets_L1) - 1), np.diff(offsets_L1))
    ids_N = ids_N[np.lexsort((ids_N, lists_N))].astype(np.int64)
    listed_ND = keys_ND[ids_N]
    return ListedKeys(runs=[run_of(0, offsets_L1, ids_N, listed_ND)], num_keys=len(keys_ND))


def run_of(
    first: int, offsets_L1: Array, ids_N: Array, keys_ND: Array, norms_N: Array | None = None
) -> ListedRun:
    """A run of arrays that are in order already; they may be read-only memory maps. Norms are computed if not
    given."""
    if norms_N is None and are_codes(keys_ND):
        norms_N = norms_of_codes(keys_ND)
    return ListedRun(
        first=first,
        offsets_L1=np.asarray(offsets_L1),
        ids_N=np.asarray(ids_N),  # slices of a memory map's own class cost five times as much
        keys_ND=view_of(keys_ND),
        norms_N=None if norms_N is None else view_of(norms_N),
    )


def view_of(array: Array) -> Tensor:
    """A tensor over the array's own memory, which may be a read-only map; nothing may write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
