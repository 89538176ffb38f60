"""List search: each query is compared with all keys of the lists that it probes.

Once `prepare` has brought the keys in the order of the lists (key_lists.py), they are read from mapped files
that the ranks of a machine share. Before that the keys of the probed lists are gathered for a few queries at
a time: enough for an audit, and nothing is written for it. Both give the same neighbours, bit for bit for
int8 codes.

Q queries, D numbers in a key, K neighbours, P lists that a query probes, L lists, M gathered keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.dealing import Dealer
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.engines.faiss_library import set_num_threads
from mlpmem_ds.formats.index_directory import TRAINED_NAME, IndexDirectory
from mlpmem_ds.formats.lists_directory import MappedLists
from mlpmem_ds.formats.mapped_keys import MappedKeys
from mlpmem_ds.maths.knn import pack_list_neighbours
from mlpmem_ds.maths.listed_keys import ListedKeys, run_of
from mlpmem_ds.maths.neighbours import Exclusion, PackedNeighbours
from mlpmem_ds.maths.search_blocks import order_of_probes
from mlpmem_ds.stages.retrieval.key_lists import make_key_lists
from mlpmem_ds.stages.retrieval.shard_lists import ShardLists, map_lists

_GATHERED_BYTES = 1 << 28  # keys of probed lists that are in memory before they lie list by list on disk


class ListSearch:
    """All keys of the nearest lists; see `open_search` for the arguments."""

    def __init__(
        self,
        keys_ND: MappedKeys,
        index: IndexDirectory,
        *,
        nprobe: int,
        lists: Path | None,
        threads: int | None,
        world: World,
        device: torch.device,
        is_verified: bool,
        dealer: Dealer | None = None,
    ) -> None:
        self.device, self.world = device, world
        self._keys_ND, self._index, self.nprobe = keys_ND, index, nprobe
        self._lists_path, self._threads = lists, threads
        self._is_verified, self._dealer = is_verified, dealer
        self._mapped: MappedLists | None = None
        self._is_prepared_together = False

    @property
    def num_bytes(self) -> int:
        return self._keys_ND.keys.bytes_of("keys") + self._index.num_bytes

    def prepare(self) -> None:
        """Make the keys in the order of the lists where they are missing, and map them. Any rank calls it
        at any time, and no rank waits for one that does not."""
        _ = self._trained
        if self._mapped is None:
            self._mapped = self._listed(None)

    def prepare_together(self) -> None:
        """`prepare` where all ranks call it: the dealer gives each its share."""
        _ = self._trained
        if not self._is_prepared_together:
            self._mapped, self._is_prepared_together = self._listed(self._dealer), True

    def _listed(self, dealer: Dealer | None) -> MappedLists | None:
        if self._lists_path is None:
            return None
        return make_key_lists(self._lists_path, self._keys_ND.keys, self._index, self.world, dealer)

    @property
    def mapped(self) -> MappedLists | None:
        """The keys list by list with their values; None where `prepare` has not brought them there."""
        return self._mapped

    def probes(self, queries_QD: np.ndarray) -> np.ndarray:
        """The lists that each query probes, nearest first: int64 [Q, P]."""
        return self._trained.assign(queries_QD, self.nprobe)

    def search(self, queries_QD: np.ndarray, k: int, exclusion: Exclusion | None = None) -> PackedNeighbours:
        probes_QP = self.probes(queries_QD)
        if self._mapped is None:
            return self._search_gathered(queries_QD, probes_QP, k, exclusion)
        return pack_list_neighbours(
            queries_QD, probes_QP, self._mapped.keys, k, exclusion=exclusion, device=self.device
        )

    def list_sizes(self, queries_QD: np.ndarray) -> np.ndarray:
        return self._sizes_L[self.probes(queries_QD)[:, 0]]

    def _search_gathered(
        self, queries_QD: np.ndarray, probes_QP: np.ndarray, k: int, exclusion: Exclusion | None
    ) -> PackedNeighbours:
        self._keys_ND.check()
        order_Q = order_of_probes(probes_QP)
        parts = []
        for block in self._split_by_lists(probes_QP[order_Q]):
            rows = order_Q[slice(*block)]
            part = exclusion and exclusion.rows(rows)
            lists = self._gathered(probes_QP[rows])
            parts.append(
                pack_list_neighbours(
                    queries_QD[rows], probes_QP[rows], lists, k, exclusion=part, device=self.device
                )
            )
        packed_QK = np.empty((len(queries_QD), k), np.int64)
        packed_QK[order_Q] = np.concatenate([part.packed_QK for part in parts])
        return replace(parts[0], packed_QK=packed_QK)

    @cached_property
    def _trained(self) -> Index:
        if self._threads is not None:
            set_num_threads(self._threads)
        self._index.check(TRAINED_NAME)
        return Index.read(self._index.trained_path, device=self.device)

    @cached_property
    def _shards(self) -> list[ShardLists]:
        """The lists of the index's shards, in their files."""
        if not self._is_verified:
            self._index.check()
        return [map_lists(self._index, shard) for shard in range(len(self._index.shard_paths))]

    @cached_property
    def _sizes_L(self) -> np.ndarray:
        if self._mapped is not None:
            return self._mapped.sizes_L
        sizes_L: np.ndarray = np.sum([shard.list_sizes() for shard in self._shards], axis=0)
        return sizes_L

    def _split_by_lists(self, probes_QP: np.ndarray) -> Iterator[Block]:
        """Queries [start, stop) whose lists together hold no more keys than may be gathered, at least one
        query."""
        row_bytes = self._keys_ND.shape[1] * self._keys_ND.dtype.itemsize
        max_keys, start = _GATHERED_BYTES // row_bytes, 0
        while start < len(probes_QP):
            stop, num_keys, is_taken_L = start, 0, np.zeros(len(self._sizes_L), bool)
            while stop < len(probes_QP):
                more = probes_QP[stop][~is_taken_L[probes_QP[stop]]]
                num_keys += int(self._sizes_L[more].sum())
                if num_keys > max_keys and stop > start:
                    break
                is_taken_L[more], stop = True, stop + 1
            yield Block(start, stop)
            start = stop

    def _gathered(self, probes_QP: np.ndarray) -> ListedKeys:
        """The keys of the lists that are probed, in memory; the other lists are empty."""
        sizes_L, ids = np.zeros(len(self._sizes_L), np.int64), [np.empty(0, np.int64)]
        for number in np.unique(probes_QP).tolist():
            ids.append(np.sort(np.concatenate([shard.ids_of_list(number) for shard in self._shards])))
            sizes_L[number] = len(ids[-1])
        ids_M = np.concatenate(ids)
        offsets_L1 = np.concatenate([[0], np.cumsum(sizes_L)])
        run = run_of(0, offsets_L1, ids_M, self._keys_ND[ids_M])
        return ListedKeys(runs=[run], num_keys=len(self._keys_ND))
