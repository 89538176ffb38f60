"""Training batches: which positions make up each batch, and their inputs, labels and targets read from disk.

Place in the pipeline: between `keys` and `targets` on disk and the trainer. The order is a pure function of
(seed, epoch): blocks of positions are permuted, `window_blocks` of them in that order make a window, and the
positions of a window are permuted among themselves. The epochs follow one another without a gap: row g of the
run is row g mod N of epoch g // N. Global batch b is the rows [b * G, (b + 1) * G), and rank r of W takes
every W-th of them from r on. So the same batches come in the same order at any world size, every rank has
equally many, and the whole state is the number of batches done. At the very end the rows that do not fill a
batch are left out.

Ordered by block, only the blocks are permuted, and rank r takes the r-th of W contiguous parts of a batch:
then inputs that are not stored can be computed window by window when they are needed (`inputs`).

N positions, G global batch, B block size, n rows of one read, I input size, E entries of sparse targets.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.hashing import shuffled
from mlpmem_ds.formats.keys import Keys
from mlpmem_ds.formats.targets import Targets
from mlpmem_ds.maths.sparse_loss import TargetBatch
from mlpmem_ds.maths.sparse_rows import SparseRows

_WINDOWS_KEPT = 2  # a batch may lie across the end of one window and the start of the next


@dataclass(frozen=True, kw_only=True)
class TrainingWindow:
    """Some blocks, whose positions are permuted together: rows [first_row, first_row + n) of an epoch.

    `blocks` ascending; `positions_n` int64 [n], in training order.
    """

    first_row: int
    blocks: tuple[int, ...]
    positions_n: np.ndarray


class TrainingOrder:
    """Which position is read at which row of a run: a pure function of the seed.

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
        self._windows: OrderedDict[tuple[int, int], TrainingWindow] = OrderedDict()

    def parts(self, start: int, stop: int) -> Iterator[tuple[TrainingWindow, np.ndarray]]:
        """The run's rows [start, stop): each window that they touch, with their positions in order."""
        while start < stop:
            epoch, row = divmod(start, self.num_positions)
            window = self._window_of(epoch, row)
            offset = row - window.first_row
            positions = window.positions_n[offset : offset + stop - start]
            yield window, positions
            start += len(positions)

    def positions(self, start: int, stop: int) -> np.ndarray:
        """int64: the positions at the run's rows [start, stop)."""
        return np.concatenate([positions for _, positions in self.parts(start, stop)])

    def _window_of(self, epoch: int, row: int) -> TrainingWindow:
        for (window_epoch, _), window in self._windows.items():
            if window_epoch == epoch and 0 <= row - window.first_row < len(window.positions_n):
                return window
        blocks = shuffled(self._num_blocks, self._seed, epoch, 0)
        sizes = np.minimum((blocks + 1) * self.block_size, self.num_positions) - blocks * self.block_size
        starts = np.concatenate([[0], np.cumsum(sizes)])[:: self._window_blocks]
        index = int(np.searchsorted(starts, row, side="right")) - 1
        chosen = np.sort(blocks[index * self._window_blocks : (index + 1) * self._window_blocks])
        inside = np.concatenate(
            [
                np.arange(block * self.block_size, min((block + 1) * self.block_size, self.num_positions))
                for block in chosen
            ]
        )
        window = TrainingWindow(
            first_row=int(starts[index]),
            blocks=tuple(chosen.tolist()),
            positions_n=(
                inside if self.by_block else inside[shuffled(len(inside), self._seed, epoch, 1 + index)]
            ),
        )
        self._windows[epoch, index] = window
        while len(self._windows) > _WINDOWS_KEPT:
            self._windows.popitem(last=False)
        return window


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """Rows of a window or of a batch.

    `inputs_nI` bfloat16 bits; `log_probabilities_n` the base's of the values, None where the loss does not
    need them; `targets` in int32 and float32.
    """

    inputs_nI: np.ndarray
    values_n: np.ndarray
    log_probabilities_n: np.ndarray | None
    targets: SparseRows

    def take(self, rows_m: np.ndarray) -> TrainingRows:
        """The rows at these indices, in their order."""
        logs_n = self.log_probabilities_n
        return TrainingRows(
            inputs_nI=self.inputs_nI[rows_m],
            values_n=self.values_n[rows_m],
            log_probabilities_n=None if logs_n is None else logs_n[rows_m],
            targets=self.targets.take(rows_m),
        )

    @classmethod
    def join(cls, parts: Sequence[TrainingRows]) -> TrainingRows:
        """The rows of the parts (at least one), one part after the other."""
        if len(parts) == 1:
            return parts[0]
        logs = [part.log_probabilities_n for part in parts if part.log_probabilities_n is not None]
        return cls(
            inputs_nI=np.concatenate([part.inputs_nI for part in parts]),
            values_n=np.concatenate([part.values_n for part in parts]),
            log_probabilities_n=np.concatenate(logs) if logs else None,
            targets=SparseRows.join([part.targets for part in parts]),
        )


class InputReader(Protocol):
    """Computes inputs that are not stored."""

    is_collective: bool
    """whether the ranks compute them together: then each calls this for every batch, in the thread that
    trains"""

    def __call__(self, runs: Sequence[Block], others: Iterable[Sequence[Block]] = ()) -> np.ndarray:
        """The inputs of ranges of positions, one after another: bit patterns of bfloat16, uint16 [n, I].

        `others`, where it is collective: every rank's ranges of this batch, in rank order.
        """


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward of the trainer takes: bfloat16 inputs [n, I] and the rows' targets."""

    inputs_NI: torch.Tensor
    targets: TargetBatch


class BatchReader:
    """Reads this rank's share of any batch.

    Args:
        keys: has inputs, values and log-probabilities.
        targets: None where only the labels count.
        order: the order of the run.
        batch_positions: G.
        rank, size: this rank's share.
        num_micro_batches: into how many equal parts a rank's share is cut.
        with_log_probabilities: whether the base's log-probabilities go along (the loss through the mixture).
        inputs: gives the inputs where the keys store none; needs an order by block.
    """

    def __init__(
        self,
        keys: Keys,
        targets: Targets | None,
        order: TrainingOrder,
        *,
        batch_positions: int,
        rank: int,
        size: int,
        num_micro_batches: int,
        with_log_probabilities: bool,
        inputs: InputReader | None = None,
    ) -> None:
        assert inputs is None or order.by_block, "inputs that are computed come block by block"
        self._inputs = inputs
        self._keys, self._targets, self._order = keys, targets, order
        self._batch_positions, self._rank, self._size = batch_positions, rank, size
        self._num_micro_batches, self._with_log_probabilities = num_micro_batches, with_log_probabilities
        self._stored: OrderedDict[tuple[int, ...], TrainingRows] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, batch: int) -> list[MicroBatch]:
        """This rank's rows of global batch number `batch`, in micro-batches."""
        return self._begin(batch)()

    def faulty_positions(self, batch: int) -> list[int]:
        """Those of this rank's positions in a batch whose inputs or targets are not finite numbers."""
        micro_batches = self.read(batch)
        with self._lock:
            start = batch * self._batch_positions
            positions = self._order.positions(start, start + self._batch_positions)
        share = self._batch_positions // self._size
        first = self._rank * share
        mine = (
            positions[first : first + share] if self._order.by_block else positions[self._rank :: self._size]
        )
        finite = torch.cat([_finite_rows(part) for part in micro_batches])
        return [int(position) for position in mine[~finite.numpy()]]

    def _begin(self, batch: int) -> Callable[[], list[MicroBatch]]:
        """Read all that any thread may read; the call that comes back does the rest, and belongs to the
        thread that trains."""
        with self._lock:
            if not self._order.by_block:
                micro_batches = self._cut(self._scattered_rows(batch))
                return lambda: micro_batches
            runs, inputs = self._runs_of(batch, self._rank), self._inputs
            rows = TrainingRows.join([self._read(run, with_inputs=inputs is None) for run in runs])
            if inputs is not None and inputs.is_collective:
                all_runs = [self._runs_of(batch, rank) for rank in range(self._size)]
                return lambda: self._cut(dataclasses.replace(rows, inputs_nI=inputs(runs, all_runs)))
            micro_batches = self._cut(
                rows if inputs is None else dataclasses.replace(rows, inputs_nI=inputs(runs))
            )
            return lambda: micro_batches

    def _cut(self, rows: TrainingRows) -> list[MicroBatch]:
        count = len(rows.values_n) // self._num_micro_batches
        return [self._micro_batch(rows, Block(at, at + count)) for at in range(0, len(rows.values_n), count)]

    def _scattered_rows(self, batch: int) -> TrainingRows:
        start = batch * self._batch_positions
        parts, skipped = [], self._rank
        for window, positions in self._order.parts(start, start + self._batch_positions):
            mine = positions[skipped :: self._size]
            skipped = (skipped - len(positions)) % self._size
            if len(mine):
                parts.append(self._load(window.blocks).take(self._rows_in(window.blocks, mine)))
        return TrainingRows.join(parts)

    def _runs_of(self, batch: int, rank: int) -> list[Block]:
        """A rank's positions in a batch, ordered by block."""
        share = self._batch_positions // self._size
        start = batch * self._batch_positions + rank * share
        return [
            Block(int(positions[0]), int(positions[-1]) + 1)
            for _, positions in self._order.parts(start, start + share)
        ]

    def stream(self, first: int, stop: int) -> Iterator[tuple[list[MicroBatch], float]]:
        """The batches [first, stop), the next one read meanwhile, each with the seconds that were spent
        waiting for it.

        What the ranks compute together is computed when its batch is needed, and counts as waiting.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            pending = pool.submit(self._begin, first) if first < stop else None
            for batch in range(first, stop):
                assert pending is not None
                start = perf_counter()
                finish = pending.result()
                pending = pool.submit(self._begin, batch + 1) if batch + 1 < stop else None
                micro_batches = finish()
                yield micro_batches, perf_counter() - start

    def _rows_in(self, blocks: tuple[int, ...], positions_n: np.ndarray) -> np.ndarray:
        size = self._order.block_size
        return np.searchsorted(np.asarray(blocks), positions_n // size) * size + positions_n % size

    def _load(self, blocks: tuple[int, ...]) -> TrainingRows:
        """The stored rows of these blocks; kept, so that a run in one window reads its data once."""
        if blocks not in self._stored:
            while len(self._stored) >= _WINDOWS_KEPT:
                self._stored.popitem(last=False)
            self._stored[blocks] = TrainingRows.join([self._read(run) for run in self._runs(blocks)])
        return self._stored[blocks]

    def _runs(self, blocks: tuple[int, ...]) -> list[Block]:
        """Neighbouring blocks joined, as ranges of positions."""
        size, total = self._order.block_size, self._order.num_positions
        array = np.asarray(blocks)
        groups = np.split(array, np.flatnonzero(np.diff(array) != 1) + 1)
        return [Block(int(group[0]) * size, min((int(group[-1]) + 1) * size, total)) for group in groups]

    def _read(self, run: Block, *, with_inputs: bool = True) -> TrainingRows:
        targets = SparseRows.empty(run.size) if self._targets is None else self._targets.read(*run)
        return TrainingRows(
            inputs_nI=self._keys.read_inputs(*run) if with_inputs else np.empty((run.size, 0), np.uint16),
            values_n=self._keys.read("values", *run),
            log_probabilities_n=(
                self._keys.read("log_probabilities", *run) if self._with_log_probabilities else None
            ),
            targets=targets.astype(np.int32, np.float32),
        )

    @staticmethod
    def _micro_batch(rows: TrainingRows, block: Block) -> MicroBatch:
        part = rows.take(np.arange(*block))
        return MicroBatch(
            inputs_NI=torch.from_numpy(part.inputs_nI).view(torch.bfloat16),
            targets=TargetBatch.from_rows(part.targets, part.values_n, part.log_probabilities_n),
        )


def _finite_rows(part: MicroBatch) -> torch.Tensor:
    """bool [N]: whether a row's inputs, target and base's log-probability are finite."""
    targets = part.targets
    finite = torch.isfinite(part.inputs_NI).all(dim=1)
    rows_E = torch.repeat_interleave(torch.arange(len(finite)), targets.offsets_N1.diff())
    finite[rows_E[~torch.isfinite(targets.probabilities)]] = False
    logs_N = targets.base_log_probabilities_N
    return finite if logs_N is None else finite & torch.isfinite(logs_N)
