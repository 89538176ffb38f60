"""Part of list search on a GPU: which queries meet which keys → **tiles**, and groups of tiles of about one
size that a few operations measure together.

Queries and lists meet in *pairs* (a query, a list that it probes), which lie list by list. A tile is some
pairs of one list times some keys of it.

Shape legend: L lists, T tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

_PAIRS, _KEYS = 128, 4096
"""of a tile, at most: its numbers fit in any budget"""
_BYTES_OF_CANDIDATE = 28
"""the product as float, rank and id, the place of both, three masks"""
_BYTES_OF_NUMBER = 5
"""of a query or a key: as int8 and as float"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiles:
    """int64 [T] each: pairs ``first_pair_T`` and the following ``num_pairs_T``; keys ``first_key_T`` and the
    following ``num_keys_T``, which are number ``column_T`` of their list and those that follow."""

    first_pair_T: Array
    num_pairs_T: Array
    first_key_T: Array
    num_keys_T: Array
    column_T: Array

    def __len__(self) -> int:
        return len(self.first_pair_T)

    def __getitem__(self, rows: Any) -> Tiles:
        return Tiles(**{name: array[rows] for name, array in vars(self).items()})

    @property
    def table(self) -> Array:
        """All of it in one array, int64 [5, T]: one copy to a device."""
        return np.stack(list(vars(self).values()))


def cut_tiles(num_pairs_L: Array, offsets_L1: Array) -> Tiles:
    """The tiles of all pairs, of which ``num_pairs_L`` are of each list; list l has the keys
    ``offsets_L1[l]:offsets_L1[l + 1]``."""
    sizes_L = np.diff(offsets_L1)
    first_pairs_L = np.cumsum(num_pairs_L) - num_pairs_L
    lists = np.flatnonzero((num_pairs_L > 0) & (sizes_L > 0))
    across, down = -(-num_pairs_L[lists] // _PAIRS), -(-sizes_L[lists] // _KEYS)
    counts = across * down
    list_T = np.repeat(lists, counts)
    number_T = np.arange(len(list_T)) - np.repeat(np.cumsum(counts) - counts, counts)
    across_T = np.repeat(across, counts)
    pair_T, column_T = number_T % across_T * _PAIRS, number_T // across_T * _KEYS
    return Tiles(
        first_pair_T=first_pairs_L[list_T] + pair_T,
        num_pairs_T=np.minimum(num_pairs_L[list_T] - pair_T, _PAIRS),
        first_key_T=offsets_L1[list_T] + column_T,
        num_keys_T=np.minimum(sizes_L[list_T] - column_T, _KEYS),
        column_T=column_T,
    )


def group_tiles(tiles: Tiles, num_dims: int, budget: int) -> Iterator[tuple[Tiles, int, int]]:
    """(tiles, pairs, keys) of each group: its tiles have at most so many pairs and keys, and more than half
    of each. With every tile filled up a group takes at most ``budget`` bytes, or it is one tile."""
    classes_T = np.stack([_powers_of_two(tiles.num_pairs_T), _powers_of_two(tiles.num_keys_T)])
    order_T = np.lexsort((tiles.num_keys_T, classes_T[1], classes_T[0]))
    tiles, classes_T = tiles[order_T], classes_T[:, order_T]
    firsts = np.flatnonzero(np.any(np.diff(classes_T, prepend=-1, axis=1), axis=0))
    stops = np.append(firsts[1:], len(tiles))[: len(firsts)]
    for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True):
        num_pairs = int(tiles.num_pairs_T[first:stop].max())
        num_keys = int(tiles.num_keys_T[first:stop].max())
        tile_bytes = num_pairs * num_keys * _BYTES_OF_CANDIDATE
        tile_bytes += (num_pairs + num_keys) * num_dims * _BYTES_OF_NUMBER
        step = max(1, budget // tile_bytes)
        for start in range(first, stop, step):
            yield tiles[start : min(start + step, stop)], num_pairs, num_keys


def split_by_pairs(tiles: Tiles) -> Iterator[tuple[Tiles, int]]:
    """(tiles, pairs): parts of the tiles that have at most so many pairs, and more than half of that (but for
    the first, of at most 16); long tiles first, so that none is begun last."""
    classes_T = np.maximum(_powers_of_two(tiles.num_pairs_T), 4)
    for exponent in np.unique(classes_T).tolist():
        part = tiles[classes_T == exponent]
        yield part[np.argsort(-part.num_keys_T, kind="stable")], 1 << exponent


def _powers_of_two(counts_T: Array) -> Array:
    """The least power of two, as its exponent, that each count is at most."""
    exponents_T: Array = np.ceil(np.log2(counts_T)).astype(np.int64)
    return exponents_T
