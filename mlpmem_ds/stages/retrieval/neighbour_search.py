"""One door to every neighbour search: the protocol, and `open_search`, which opens one by its name.

Q queries, D numbers in a key, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from mlpmem_ds.core.dealing import Dealer
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.index_directory import IndexDirectory
from mlpmem_ds.formats.keys import Keys
from mlpmem_ds.formats.lists_directory import MappedLists
from mlpmem_ds.formats.mapped_keys import MappedKeys
from mlpmem_ds.maths.distances import CPU
from mlpmem_ds.maths.neighbours import Exclusion, Neighbours, PackedNeighbours
from mlpmem_ds.stages.retrieval.exact_search import ExactSearch

How = Literal["exact", "lists", "index"]
"""all keys; all keys of the nearest lists; what the index finds by its codes"""


class NeighbourSearch(Protocol):
    """The nearest of a set of keys; key n has id n."""

    @property
    def num_bytes(self) -> int:
        """What it searches, in bytes on disk."""

    def prepare(self) -> None:
        """Read, check or make what all searches need; before threads share the search, and before a clock
        runs."""

    def search(self, queries_QD: np.ndarray, k: int, exclusion: Exclusion | None = None) -> PackedNeighbours:
        """The k nearest keys of each query in the order (distance, id), but for those that it may not find.

        Queries have the dtype of the stored keys. With int8 codes distances are exact integers. Many queries
        in one call cost less than one call each.
        """

    def list_sizes(self, queries_QD: np.ndarray) -> np.ndarray:
        """Keys in the list that each query falls in, int64 [Q]; all keys where there are no lists."""

    @property
    def mapped(self) -> MappedLists | None:
        """The keys list by list and all values, mapped; None where the search has no such directory."""


def open_search(
    keys: Keys,
    index: IndexDirectory | None = None,
    *,
    how: How,
    nprobe: int = 32,
    num_keys: int | None = None,
    lists: Path | None = None,
    threads: int | None = None,
    world: World | None = None,
    device: torch.device = CPU,
    is_verified: bool = False,
    dealer: Dealer | None = None,
) -> NeighbourSearch:
    """A search of these keys.

    Args:
        keys: what is searched; no search holds all of them in memory.
        index: over these keys; needed for `lists` and `index`.
        how: see `How`.
        nprobe: lists that a query probes.
        num_keys: search the first keys only (not with `lists`); None = all.
        lists: with `lists`: where `prepare` finds or makes the keys in the order of the lists; None = keys of
            the probed lists are gathered at every call, which is slow for many queries.
        threads: of faiss; None = as the environment says.
        world: with `lists`: the ranks that make that directory together.
        device: where queries are compared with keys and centroids.
        is_verified: units of a stage compare keys and index with their checksums; else `prepare` does, with
            all that is searched.
        dealer: with `lists`: deals the units of that directory among the ranks.

    Raises:
        UserError: `how` needs an index and there is none, or codes and it has lists alone.
    """
    if how != "exact" and index is None:
        raise UserError(f"a search of {keys.root} by {how} needs --index: build one with build_index")
    if how == "index" and index is not None and not index.has_codes:
        raise UserError(
            f"--index {index.root} has lists without codes ({index.factory}), which only write_targets reads:"
            " build one with --factory auto into another directory, or leave --index out"
        )
    source = _Source(
        keys=keys,
        index=index,
        nprobe=nprobe,
        num_keys=num_keys,
        lists=lists,
        threads=threads,
        world=World() if world is None else world,
        device=device,
        is_verified=is_verified,
        dealer=dealer,
    )
    return _OPENERS[how](source)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The arguments of `open_search`."""

    keys: Keys
    index: IndexDirectory | None
    nprobe: int
    num_keys: int | None
    lists: Path | None
    threads: int | None
    world: World
    device: torch.device
    is_verified: bool
    dealer: Dealer | None

    @property
    def keys_ND(self) -> MappedKeys:
        return MappedKeys(self.keys, self.num_keys, is_verified=self.is_verified)


def _open_exact(source: _Source) -> NeighbourSearch:
    return ExactSearch(source.keys_ND, source.device)


# faiss is imported only where an index is searched: it takes a second.
def _open_lists(source: _Source) -> NeighbourSearch:
    from mlpmem_ds.stages.retrieval.list_search import ListSearch

    assert source.index is not None and source.num_keys is None
    return ListSearch(
        source.keys_ND,
        source.index,
        nprobe=source.nprobe,
        lists=source.lists,
        threads=source.threads,
        world=source.world,
        device=source.device,
        is_verified=source.is_verified,
        dealer=source.dealer,
    )


def _open_index(source: _Source) -> NeighbourSearch:
    from mlpmem_ds.stages.retrieval.index_search import IndexSearch

    assert source.index is not None
    return IndexSearch(
        source.keys_ND, source.index, nprobe=source.nprobe, threads=source.threads, device=source.device
    )


_OPENERS: dict[How, Callable[[_Source], NeighbourSearch]] = {
    "exact": _open_exact,
    "lists": _open_lists,
    "index": _open_index,
}


def squared_key_distances(neighbours: Neighbours, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(distances² in key units, float64 [Q, K]; which are neighbours, bool [Q, K]) of keys of this scale."""
    valid_QK = neighbours.ids_QK >= 0
    return np.where(valid_QK, neighbours.distances_QK, 0).astype(np.float64) * scale**2, valid_QK
