"""The order of a training: which position is read at which row of the run, and which rank reads it.

The order is a pure function of (seed, epoch): blocks of positions are permuted, `window_blocks` of them in
that order make a window, and the positions of a window are permuted among themselves. The epochs follow one
another without a gap: row g of the run is row g mod N of epoch g // N. Global batch b is the rows
[b * G, (b + 1) * G). So the same batches come in the same order at any world size, every rank has equally
many rows of each, and the whole state is the number of batches done. At the very end the rows that do not
fill a batch are left out.

The rows of a batch are dealt in the order of their blocks: rank r of W takes those of about the r-th of W
parts of each window, so that it reads about a W-th of the window and not all of it. A rank's rows stay in the
order of the batch: one rank reads the order itself.

Ordered by block, only the blocks are permuted, and rank r takes the r-th of W contiguous parts of a batch:
then inputs that are not stored can be computed window by window when they are needed.

N positions, G global batch, B block size, L blocks of a window, n rows of a window, m rows of a rank.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.hashing import Permutation, shuffled

_EPOCHS_KEPT = 2  # a batch may lie across the end of one epoch and the start of the next
_WINDOWS_KEPT = 4  # as with windows; and the next ones are read ahead


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingWindow:
    """Some blocks, whose positions are permuted together: rows [first_row, first_row + n) of an epoch.

    `blocks_L` int64, ascending; `rows_n` int64: which of the blocks' rows, counted through the blocks,
    stands at each place of the order.
    """

    epoch: int
    number: int
    first_row: int
    block_size: int
    blocks_L: np.ndarray
    rows_n: np.ndarray

    @property
    def key(self) -> tuple[int, int]:
        """Ascends with the order."""
        return self.epoch, self.number

    @property
    def positions_n(self) -> np.ndarray:
        """int64: the window's positions in the order of the training."""
        return self.positions_of(self.rows_n)

    def positions_of(self, rows_m: np.ndarray) -> np.ndarray:
        """int64: the positions of some of the blocks' rows."""
        positions: np.ndarray = self.blocks_L[self.places_of(rows_m)] * self.block_size + (
            rows_m % self.block_size
        )
        return positions

    def places_of(self, rows_m: np.ndarray) -> np.ndarray:
        """int64: which of the blocks each row is in; all but the last block of a split are full."""
        places: np.ndarray = rows_m // self.block_size
        return places


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """Rows of one batch that lie in one window: all of them, or those of one rank. `rows_m` as
    `TrainingWindow.rows_n`, in the order of the batch."""

    window: TrainingWindow
    rows_m: np.ndarray

    @property
    def positions_m(self) -> np.ndarray:
        return self.window.positions_of(self.rows_m)


class TrainingOrder:
    """Which position is read at which row of a run: a pure function of the seed. Any thread may ask.

    Args:
        num_positions: N, the rows of an epoch.
        block_size: B, positions of a block; the last one may be shorter.
        window_blocks: blocks whose positions are permuted together.
        seed: of all permutations.
        by_block: only blocks are permuted; a window is then one block, its positions ascending.
    """

    def __init__(
        self, *, num_positions: int, block_size: int, window_blocks: int, seed: int, by_block: bool = False
    ) -> None:
        self.num_positions, self.block_size, self.by_block = num_positions, block_size, by_block
        self._window_blocks, self._seed = 1 if by_block else window_blocks, seed
        self._num_blocks = -(-num_positions // block_size)
        self._missing = self._num_blocks * block_size - num_positions
        self._epochs: OrderedDict[int, tuple[Permutation, int]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], TrainingWindow] = OrderedDict()
        self._lock = threading.RLock()

    def parts(self, start: int, stop: int) -> Iterator[Share]:
        """The run's rows [start, stop): each window that they touch, with its rows in order."""
        while start < stop:
            epoch, row = divmod(start, self.num_positions)
            window = self._window_at(epoch, row)
            offset = row - window.first_row
            rows_m = window.rows_n[offset : offset + stop - start]
            yield Share(window=window, rows_m=rows_m)
            start += len(rows_m)

    def positions(self, start: int, stop: int) -> np.ndarray:
        """int64: the positions at the run's rows [start, stop)."""
        return np.concatenate([part.positions_m for part in self.parts(start, stop)])

    def shares(self, batch: int, batch_positions: int, *, rank: int, size: int) -> list[Share]:
        """A rank's rows of a global batch of G rows; G is a multiple of `size`."""
        start, share = batch * batch_positions, batch_positions // size
        if self.by_block:
            return list(self.parts(start + rank * share, start + (rank + 1) * share))
        return deal(list(self.parts(start, start + batch_positions)), rank=rank, size=size)

    def runs(self, batch: int, batch_positions: int, *, size: int) -> list[list[Block]]:
        """Ordered by block: each rank's rows of a global batch as ranges of positions, in rank order."""
        assert self.by_block, "other rows are no ranges"
        share, start = batch_positions // size, batch * batch_positions
        ranks: list[list[Block]] = [[] for _ in range(size)]
        taken = 0
        for part in self.parts(start, start + batch_positions):
            first = int(part.window.blocks_L[0]) * self.block_size + int(part.rows_m[0])
            stop = first + len(part.rows_m)
            while first < stop:
                end = min(stop, first + share - taken % share)
                ranks[taken // share].append(Block(first, end))
                taken, first = taken + end - first, end
        return ranks

    def next_window(self, window: TrainingWindow) -> TrainingWindow:
        """The one that follows, which may be the first of the next epoch."""
        row = window.first_row + len(window.rows_n)
        return self._window_at(window.epoch + row // self.num_positions, row % self.num_positions)

    def _window_at(self, epoch: int, row: int) -> TrainingWindow:
        with self._lock:
            permutation, place_of_last = self._epoch(epoch)
            is_after = row >= (place_of_last + 1) * self.block_size - self._missing
            place = (row + (self._missing if is_after else 0)) // self.block_size
            number = place // self._window_blocks
            if (epoch, number) not in self._windows:
                while len(self._windows) >= _WINDOWS_KEPT:
                    self._windows.popitem(last=False)
                self._windows[epoch, number] = self._make_window(epoch, number, permutation, place_of_last)
            return self._windows[epoch, number]

    def _epoch(self, epoch: int) -> tuple[Permutation, int]:
        """The order of the blocks in an epoch, and the place of the block that may be shorter."""
        if epoch not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
            permutation = Permutation(self._num_blocks, self._seed, epoch, 0)
            self._epochs[epoch] = permutation, permutation.place_of(self._num_blocks - 1)
        return self._epochs[epoch]

    def _make_window(
        self, epoch: int, number: int, permutation: Permutation, place_of_last: int
    ) -> TrainingWindow:
        first = number * self._window_blocks
        blocks_L = np.sort(permutation.items(first, min(first + self._window_blocks, self._num_blocks)))
        num_rows = len(blocks_L) * self.block_size
        if blocks_L[-1] == self._num_blocks - 1:
            num_rows -= self._missing
        return TrainingWindow(
            epoch=epoch,
            number=number,
            first_row=first * self.block_size - (self._missing if first > place_of_last else 0),
            block_size=self.block_size,
            blocks_L=blocks_L,
            rows_n=(
                np.arange(num_rows) if self.by_block else shuffled(num_rows, self._seed, epoch, 1 + number)
            ),
        )


def deal(parts: Sequence[Share], *, rank: int, size: int) -> list[Share]:
    """The rank's rows of a batch: a W-th of them, those of the r-th part of each window's blocks.

    Rows of one block may fall to two ranks or more, in the order of the batch; no two ranks have a row in
    common, and all have equally many. It costs a few operations a row of the batch.
    """
    if size == 1:
        return list(parts)
    num_bins = max(len(part.window.blocks_L) for part in parts)
    # A window at the end of an epoch may have fewer blocks: its own are spread over as many bins.
    bins_G = np.concatenate(
        [part.window.places_of(part.rows_m) * num_bins // len(part.window.blocks_L) for part in parts]
    )
    num_rows = len(bins_G)
    ends = np.cumsum(np.bincount(bins_G, minlength=num_bins))
    first, stop = num_rows * rank // size, num_rows * (rank + 1) // size
    first_bin, last_bin = np.searchsorted(ends, [first, stop - 1], side="right")
    near = np.flatnonzero((bins_G >= first_bin) & (bins_G <= last_bin))
    near = near[np.argsort(bins_G[near], kind="stable")]
    before = int(ends[first_bin - 1]) if first_bin else 0
    mine = np.sort(near[first - before : stop - before])
    bounds = np.searchsorted(mine, np.cumsum([len(part.rows_m) for part in parts]))
    shares, at, offset = [], 0, 0
    for part, bound in zip(parts, bounds.tolist(), strict=True):
        if bound > at:
            shares.append(Share(window=part.window, rows_m=part.rows_m[mine[at:bound] - offset]))
        at, offset = bound, offset + len(part.rows_m)
    return shares
