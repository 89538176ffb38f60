"""Windows of a training order, read from keys and targets: a rank's blocks of each, in several threads.

A window is kept while batches lie in it, and the next one is read meanwhile. What is kept is decoded targets
and labels: 8 bytes an entry and about 14 a row, of two windows' shares (with 1,024 blocks of 1,024 rows, 300
entries a row and W ranks: 2 x 2.5 GB / W). Inputs are not kept: they are read from the mapped files when a
batch is put together, and the operating system is told of them when their window begins, so that it reads
them ahead into memory that it may take back.

B block size, L blocks of a window, m rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.formats.training_order import Share, TrainingOrder, TrainingWindow
from mlpmem_ds.formats.training_rows import TrainingRows
from mlpmem_ds.maths.sparse_rows import SparseRows

_BLOCKS_A_READ = 32
"""read by one thread as one piece: a batch takes rows of every piece, and few pieces make that quick"""


class StoredKeys(Protocol):
    """What of `formats.keys.Keys` a training reads."""

    def read(self, array: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `Keys`."""

    def read_inputs(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `Keys`."""

    def gather_inputs(self, positions_n: np.ndarray) -> np.ndarray:
        """See `Keys`."""

    def read_inputs_ahead(self, start: int, stop: int) -> None:
        """See `Keys`."""


class StoredTargets(Protocol):
    """What of `formats.targets.Targets` a training reads."""

    def read(self, start: int, stop: int) -> SparseRows:
        """See `Targets`."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows come from; `targets` None where only the labels count."""

    keys: StoredKeys
    targets: StoredTargets | None
    with_log_probabilities: bool
    num_positions: int
    block_size: int

    def read(self, run: Block) -> TrainingRows:
        """The rows of a range of positions."""
        targets = SparseRows.empty(run.size) if self.targets is None else self.targets.read(*run)
        return TrainingRows(
            values_n=self.keys.read("values", *run),
            log_probabilities_n=(
                self.keys.read("log_probabilities", *run) if self.with_log_probabilities else None
            ),
            targets=targets.astype(np.int32, np.float32),
        )

    def read_blocks(self, blocks_l: np.ndarray) -> TrainingRows:
        """The rows of ascending blocks; neighbouring ones are read at once."""
        return TrainingRows.join([self.read(run) for run in self.runs(blocks_l)])

    def runs(self, blocks_l: np.ndarray) -> list[Block]:
        """Ascending blocks as ranges of positions."""
        size, total = self.block_size, self.num_positions
        groups = np.split(blocks_l, np.flatnonzero(np.diff(blocks_l) != 1) + 1)
        return [Block(int(group[0]) * size, min((int(group[-1]) + 1) * size, total)) for group in groups]


@dataclass(eq=False)
class _Piece:
    """Blocks [first, first + count) of a window."""

    first: int
    rows: Future[TrainingRows]


@dataclass(eq=False)
class WindowShare:
    """A rank's blocks of a window: read in pieces, in the pool's threads; what lies beyond them, at once."""

    source: Source
    window: TrainingWindow
    _pieces: list[_Piece] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._piece_of_L = np.full(len(self.window.blocks_L), -1)

    def begin(self, *, rank: int, size: int, pool: Executor) -> None:
        """Start to read the blocks that fall to a rank, and tell the system that their inputs are next."""
        count = len(self.window.blocks_L)
        first, stop = count * rank // size, -(-count * (rank + 1) // size)
        for at in range(first, stop, _BLOCKS_A_READ):
            self._read(at, min(at + _BLOCKS_A_READ, stop), pool.submit)

    def gather(self, rows_m: np.ndarray) -> TrainingRows:
        """Some of the window's rows, in their order; waits for those that are being read."""
        places_m = self.window.places_of(rows_m)
        new = np.unique(places_m[self._piece_of_L[places_m] < 0])
        for group in np.split(new, np.flatnonzero(np.diff(new) != 1) + 1) if len(new) else ():
            self._read(int(group[0]), int(group[-1]) + 1, _at_once)
        numbers, part_of_m = np.unique(self._piece_of_L[places_m], return_inverse=True)
        pieces = [self._pieces[number] for number in numbers.tolist()]
        firsts = np.array([piece.first for piece in pieces])
        return TrainingRows.gather(
            [piece.rows.result() for piece in pieces],
            part_of_m,
            rows_m - firsts[part_of_m] * self.window.block_size,
        )

    def cancel(self) -> None:
        """Read nothing more."""
        for piece in self._pieces:
            piece.rows.cancel()

    def _read(self, first: int, stop: int, submit: Callable[..., Future[TrainingRows]]) -> None:
        self._piece_of_L[first:stop] = len(self._pieces)
        rows = submit(self._read_piece, self.window.blocks_L[first:stop])
        self._pieces.append(_Piece(first=first, rows=rows))

    def _read_piece(self, blocks_l: np.ndarray) -> TrainingRows:
        for run in self.source.runs(blocks_l):
            self.source.keys.read_inputs_ahead(*run)
        return self.source.read_blocks(blocks_l)


def _at_once(function: Callable[..., TrainingRows], blocks_l: np.ndarray) -> Future[TrainingRows]:
    """In this thread: the pool is busy with the next window, and a batch waits for this."""
    future: Future[TrainingRows] = Future()
    future.set_result(function(blocks_l))
    return future


class Windows:
    """The windows that a rank's batches lie in, one after another.

    Args:
        source: where the rows come from.
        order: of the run.
        rank, size: whose share is read ahead.
        stop: row of the run from which on nothing is read ahead.
        pool: the threads that read.
    """

    def __init__(
        self, source: Source, order: TrainingOrder, *, rank: int, size: int, stop: int, pool: Executor
    ) -> None:
        self._source, self._order, self._pool = source, order, pool
        self._rank, self._size, self._stop = rank, size, stop
        self._open: dict[tuple[int, int], WindowShare] = {}

    def gather(self, shares: Sequence[Share]) -> TrainingRows:
        """The rows of a batch; a later call is for a later batch. Then windows before it are let go, and the
        one after it is begun."""
        self._keep_from(shares[0].window)
        for share in shares:
            self._begin(share.window)
        rows = TrainingRows.join([self._open[share.window.key].gather(share.rows_m) for share in shares])
        if len(shares) == 1:  # else the window before is still held: two at a time
            following = self._order.next_window(shares[0].window)
            if following.epoch * self._order.num_positions + following.first_row < self._stop:
                self._begin(following)
        return rows

    def _keep_from(self, window: TrainingWindow) -> None:
        for key in [key for key in self._open if key < window.key]:
            share = self._open.pop(key)
            if share not in self._open.values():
                share.cancel()

    def _begin(self, window: TrainingWindow) -> None:
        if window.key in self._open:
            return
        for share in self._open.values():
            if np.array_equal(share.window.blocks_L, window.blocks_L):  # a small split is one window
                self._open[window.key] = share
                return
        self._open[window.key] = share = WindowShare(self._source, window)
        share.begin(rank=self._rank, size=self._size, pool=self._pool)
