"""Pipeline: keys and index → **keys list by list** → neighbours. What a search through inverted lists reads.

The keys of a list lie side by side, in the order of their ids, so that a search multiplies with a slice of an
array (often a memory map that the ranks of a machine share) where it would gather rows one by one. A large
datastore is written in runs of positions; a list is then one slice of each run. A *group* of lists side by
side, copied into one piece, is what one rank or one GPU searches.

Shape legend: R runs, L lists, G lists of a group, N keys of a run, K keys of a list, D dimensions, Q queries,
P probes.
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

from mlpmem_ds.maths.distances import CPU, are_codes, norms_of_codes
from mlpmem_ds.maths.neighbours import check_probes
from mlpmem_ds.maths.search_blocks import budget_blocks

Array: TypeAlias = np.ndarray[Any, Any]

ID_AND_NORM_BYTES = 12
"""of a key in memory, in addition to its numbers: int64 and int32"""
_STRETCH_BYTES = 1 << 28  # keys that are on their way into a group at a time


@dataclass(frozen=True, kw_only=True)
class ListedRun:
    """Some keys in the order (list, id): those of list l are rows ``offsets_L1[l]:offsets_L1[l + 1]``.

    ``ids_N`` integers, the id less ``first`` (a tensor where the keys are on a GPU); ``keys_ND`` a tensor;
    ``norms_N`` int32, the `squared_norms` of int8 codes, None for float keys.
    """

    first: int
    offsets_L1: Array
    ids_N: Any
    keys_ND: Tensor
    norms_N: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class ListedKeys:
    """Keys list by list, in runs of ascending ids; all ids are below ``num_keys``.

    All lists of an index, or a group of them: the index has ``num_all_lists`` (None: as many as are here), of
    which these are number ``first_list`` and those that follow it. Methods count lists from the first that is
    here, but for `group`.
    """

    runs: Sequence[ListedRun]
    num_keys: int
    first_list: int = 0
    num_all_lists: int | None = None

    @property
    def num_lists(self) -> int:
        return len(self.runs[0].offsets_L1) - 1

    @property
    def device(self) -> torch.device:
        return self.runs[0].keys_ND.device

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
        sizes_L = np.zeros(self.num_lists, np.int64)
        for run in self.runs:  # an array of runs × lists would be 200 GB for 2e11 keys
            sizes_L += np.diff(run.offsets_L1)
        return sizes_L

    def local_probes(self, probes_QP: Array, num_queries: int) -> Array:
        """Numbers of lists of the index (int64, -1 = none) as those of the lists that are here, -1 for
        others.

        Raises ValueError where a number is none of the index, a query has one twice, or rows are missing.
        """
        check_probes(probes_QP, num_queries, self.num_all_lists or self.num_lists)
        if self.num_all_lists is None:
            return probes_QP
        local_QP = probes_QP - self.first_list
        return np.where((local_QP >= 0) & (local_QP < self.num_lists), local_QP, -1)

    def sizes_of(self, local_QP: Array) -> Array:
        """Keys in the list of each probe, int64 [Q, P]; 0 where there is no list."""
        if not self.num_lists:
            return np.zeros(local_QP.shape, np.int64)
        return np.where(local_QP >= 0, self.sizes_L[local_QP], 0)

    def part(self, first: int, stop: int) -> ListedKeys:
        """The lists [first, stop) of the index where they lie: nothing is copied."""
        lists = slice(first - self.first_list, stop - self.first_list + 1)

        def cut(run: ListedRun) -> ListedRun:
            offsets_G1 = run.offsets_L1[lists]
            rows = slice(int(offsets_G1[0]), int(offsets_G1[-1]))
            return ListedRun(
                first=run.first,
                offsets_L1=offsets_G1 - offsets_G1[0],
                ids_N=run.ids_N[rows],
                keys_ND=run.keys_ND[rows],
                norms_N=None if run.norms_N is None else run.norms_N[rows],
            )

        return ListedKeys(
            runs=[cut(run) for run in self.runs],
            num_keys=self.num_keys,
            first_list=first,
            num_all_lists=self.num_all_lists or self.num_lists,
        )

    def group(self, first: int, stop: int, device: torch.device = CPU) -> ListedKeys:
        """The lists [first, stop) of the index in one piece, in the order (list, id), in a device's memory.

        A stretch of lists is read at a time, in each run one piece of a file: the host holds no second copy.
        """
        num_all_lists = self.num_all_lists or self.num_lists
        first, stop = first - self.first_list, stop - self.first_list
        sizes_G = self.sizes_L[first:stop]
        offsets_G1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes_G)])
        num_keys, is_integer = int(offsets_G1[-1]), self.runs[0].norms_N is not None
        keys_ND = torch.empty((num_keys, self.num_dims), dtype=self.dtype, device=device)
        norms_N = torch.empty(num_keys, dtype=torch.int32, device=device) if is_integer else None
        ids_N = torch.empty(num_keys, dtype=torch.int64, device=device)
        row_bytes = max(1, self.num_dims * keys_ND.element_size())
        for stretch in budget_blocks(sizes_G, _STRETCH_BYTES // row_bytes):
            rows = slice(int(offsets_G1[stretch[0]]), int(offsets_G1[stretch[1]]))
            keys, norms, ids = self._stretch(first + stretch[0], first + stretch[1], device)
            keys_ND[rows], ids_N[rows] = keys, ids
            if norms_N is not None and norms is not None:
                norms_N[rows] = norms
        run = ListedRun(
            first=0,
            offsets_L1=offsets_G1,
            ids_N=ids_N.numpy() if device.type == "cpu" else ids_N,
            keys_ND=keys_ND,
            norms_N=norms_N,
        )
        return ListedKeys(
            runs=[run],
            num_keys=self.num_keys,
            first_list=first + self.first_list,
            num_all_lists=num_all_lists,
        )

    def _stretch(self, first: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
        """(keys, norms, ids int64) of some lists in the order (list, id), on a device."""
        parts = [(run, slice(int(run.offsets_L1[first]), int(run.offsets_L1[stop]))) for run in self.runs]
        ids = [ids_as_tensor(run, rows).to(device) for run, rows in parts]
        keys = [run.keys_ND[rows].to(device) for run, rows in parts]
        norms = [run.norms_N[rows].to(device) for run, rows in parts if run.norms_N is not None]
        if len(parts) == 1:
            return keys[0], norms[0] if norms else None, ids[0]
        sizes = [np.diff(run.offsets_L1[first : stop + 1]) for run in self.runs]
        lists = np.concatenate([np.repeat(np.arange(stop - first), size) for size in sizes])
        order = torch.from_numpy(np.argsort(lists, kind="stable")).to(device)
        return torch.cat(keys)[order], torch.cat(norms)[order] if norms else None, torch.cat(ids)[order]

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


def ids_as_tensor(run: ListedRun, rows: slice = slice(None)) -> Tensor:
    """The ids of some keys of a run, int64, where its ids are."""
    ids_N = run.ids_N[rows]
    if not isinstance(ids_N, Tensor):
        ids_N = torch.from_numpy(ids_N.astype(np.int64))
    return ids_N + run.first if run.first else ids_N


def view_of(array: Array) -> Tensor:
    """A tensor over the array's own memory, which may be a read-only map; nothing may write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
