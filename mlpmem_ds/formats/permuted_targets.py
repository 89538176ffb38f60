"""Targets given to other positions: a control of what the memory learns from those of its own.

Part of `train --control permuted-targets`. Each position gets the target of another one, no target is given
twice, and no position keeps its own. The permutation is a function of the seed, and a block's targets are all
those of one other block, in another order: so a block costs one read, in any order and for any rank, as
without it. Positions of the last block, where it is shorter than the others, change among themselves.

n rows (positions) of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mlpmem_ds.core.hashing import Permutation, shuffled
from mlpmem_ds.formats.targets import Targets
from mlpmem_ds.maths.sparse_rows import SparseRows

_BLOCKS, _ROWS = 0, 1  # what is permuted: keys of the random numbers


@dataclass(frozen=True, eq=False)
class PermutedTargets:
    """Reads like `Targets`."""

    targets: Targets
    seed: int

    def read(self, start: int, stop: int) -> SparseRows:
        """The rows that the positions [start, stop), at least one, are given. See `Targets.read`."""
        size, total = self.targets.manifest.block_size, self.targets.num_positions
        parts = []
        for block in range(start // size, -(-stop // size)):
            first = block * size
            source = self._source(block)
            rows = self.targets.read(source * size, min((source + 1) * size, total))
            order_n = _deranged(rows.num_rows, self.seed, _ROWS, block)
            parts.append(rows.take(order_n[max(start - first, 0) : stop - first]))
        return SparseRows.join(parts)

    def _source(self, block: int) -> int:
        """The block whose targets this one is given: the next in a random order, round in a circle."""
        blocks = self._blocks
        if block >= blocks.count:
            return block
        place = (blocks.place_of(block) + 1) % blocks.count
        return int(blocks.items(place, place + 1)[0])

    @cached_property
    def _blocks(self) -> Permutation:
        """Of the blocks that are whole."""
        manifest = self.targets.manifest
        return Permutation(manifest.num_positions // manifest.block_size, self.seed, _BLOCKS)


def _deranged(count: int, *keys: int) -> np.ndarray:
    """int64 [n]: a permutation of range(count) that leaves none in its place, if there are two or more."""
    places_n = shuffled(count, *keys)
    order_n = np.empty_like(places_n)
    order_n[places_n] = np.roll(places_n, -1)
    return order_n
