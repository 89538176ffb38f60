"""Training batches: a rank's rows of any global batch, with inputs, labels and targets, read from disk.

Place in the pipeline: between `keys` and `targets` on disk and the trainer. `training_order` says which rows
those are, `training_windows` reads them, several threads ahead of the training.

G global batch, n rows of one read, I input size.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from time import perf_counter
from typing import Protocol

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.formats.training_order import TrainingOrder
from mlpmem_ds.formats.training_rows import (
    MicroBatch,
    TrainingRows,
    finite_rows,
    micro_batches,
    stored_inputs,
)
from mlpmem_ds.formats.training_windows import Source, StoredKeys, StoredTargets, Windows

_MAX_THREADS = 8
_BATCHES_AHEAD = 2
Finish = Callable[[], list[MicroBatch]]


class InputReader(Protocol):
    """Computes inputs that are not stored."""

    is_collective: bool
    """whether the ranks compute them together: then each calls this for every batch, in the thread that
    trains"""

    def __call__(self, runs: Sequence[Block], others: Iterable[Sequence[Block]] = ()) -> torch.Tensor:
        """The inputs of ranges of positions, one after another: bfloat16 [n, I], on any device.

        `others`, where it is collective: every rank's ranges of this batch, in rank order.
        """


def threads_for(ranks_of_node: int) -> int:
    """Threads that one of so many ranks on this machine reads with, if nothing else is asked for: the cores
    that the launcher bound it to, or its part of all cores; at most eight."""
    own, cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    return max(1, min(_MAX_THREADS, own if own < cores else cores // max(ranks_of_node, 1)))


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
        threads: that decode windows ahead of the training.
    """

    def __init__(
        self,
        keys: StoredKeys,
        targets: StoredTargets | None,
        order: TrainingOrder,
        *,
        batch_positions: int,
        rank: int,
        size: int,
        num_micro_batches: int,
        with_log_probabilities: bool,
        inputs: InputReader | None = None,
        threads: int = 1,
    ) -> None:
        assert inputs is None or order.by_block, "inputs that are computed come block by block"
        self._source = Source(
            keys=keys,
            targets=targets,
            with_log_probabilities=with_log_probabilities,
            num_positions=order.num_positions,
            block_size=order.block_size,
        )
        self._inputs, self._order = inputs, order
        self._batch_positions, self._rank, self._size = batch_positions, rank, size
        self._num_micro_batches, self._threads = num_micro_batches, threads

    @property
    def may_run_ahead(self) -> bool:
        """Whether any thread may take the stream, ahead of the training."""
        return self._inputs is None or not self._inputs.is_collective

    def read(self, batch: int) -> list[MicroBatch]:
        """This rank's rows of global batch number `batch`, in micro-batches."""
        ((parts, _),) = self.stream(batch, batch + 1)
        return parts

    def stream(self, first: int, stop: int) -> Iterator[tuple[list[MicroBatch], float]]:
        """The batches [first, stop), two more read meanwhile, each with the seconds that were spent waiting
        for it.

        What the ranks compute together is computed when its batch is needed, and counts as waiting.
        """
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(self._threads, thread_name_prefix="windows"))
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            ahead = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="batches"))
            stack.callback(ahead.shutdown, wait=False, cancel_futures=True)
            begin = self._beginner(pool, stop)
            pending: list[Future[Finish]] = []
            for batch in range(first, stop):
                for number in range(batch + len(pending), min(batch + 1 + _BATCHES_AHEAD, stop)):
                    pending.append(ahead.submit(begin, number))
                start = perf_counter()
                parts = pending.pop(0).result()()
                yield parts, perf_counter() - start

    def state_after(self, step: int) -> None:
        """None: a batch is a function of its number."""

    def continue_from(self, state: None) -> None:
        """Nothing to go on from."""

    def faulty_positions(self, batch: int) -> list[int]:
        """Those of this rank's positions in a batch whose inputs or targets are not finite numbers."""
        finite = torch.cat([finite_rows(part) for part in self.read(batch)])
        shares = self._order.shares(batch, self._batch_positions, rank=self._rank, size=self._size)
        mine = np.concatenate([share.positions_m for share in shares])
        return [int(position) for position in mine[~finite.numpy()]]

    def _beginner(self, pool: Executor, stop: int) -> Callable[[int], Finish]:
        """Reads all of a batch that any thread may read; the call that comes back does the rest, and belongs
        to the thread that trains."""
        if self._order.by_block:
            return lambda batch: self._begin_runs(batch, pool)
        windows = Windows(
            self._source,
            self._order,
            rank=self._rank,
            size=self._size,
            stop=stop * self._batch_positions,
            pool=pool,
        )
        return lambda batch: self._begin_scattered(batch, windows)

    def _begin_scattered(self, batch: int, windows: Windows) -> Finish:
        shares = self._order.shares(batch, self._batch_positions, rank=self._rank, size=self._size)
        rows = windows.gather(shares)
        positions_n = np.concatenate([share.positions_m for share in shares])
        return self._finished(stored_inputs(self._source.keys.gather_inputs(positions_n)), rows)

    def _begin_runs(self, batch: int, pool: Executor) -> Finish:
        """Ordered by block: a rank's rows are ranges of positions."""
        all_runs = self._order.runs(batch, self._batch_positions, size=self._size)
        runs, inputs = all_runs[self._rank], self._inputs
        rows = TrainingRows.join(list(pool.map(self._source.read, runs)))
        if inputs is None:
            stored = list(pool.map(lambda run: self._source.keys.read_inputs(*run), runs))
            return self._finished(stored_inputs(np.concatenate(stored)), rows)
        if not inputs.is_collective:
            return self._finished(inputs(runs), rows)
        return lambda: micro_batches(inputs(runs, all_runs), rows, self._num_micro_batches)

    def _finished(self, inputs_NI: torch.Tensor, rows: TrainingRows) -> Finish:
        parts = micro_batches(inputs_NI, rows, self._num_micro_batches)
        return lambda: parts
