"""Part of `extract_keys`: the files of a unit, written and hashed by a thread while the base reads on.

A unit is in memory a few batches at a time. Its files appear when the last row is written, all of them before
its record, as everywhere: a kill at any moment costs the unit that was being made.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from mlpmem_ds.core.array_files import ArrayWriter
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.stages.keys.rows import ARRAYS

_BATCHES_BEHIND = 2


@contextlib.contextmanager
def unit_files(writer: UnitWriter, num_positions: int, name_of: Callable[[str], str]) -> Iterator[UnitFiles]:
    """While open, rows can be put; on leaving without an error, the unit's files appear.

    Args:
        writer: publishes the files and keeps their records.
        num_positions: rows of every array.
        name_of: array → its file's name.
    """

    def open_file(name: str, rows: np.ndarray) -> ArrayWriter:
        shape = (num_positions, *rows.shape[1:])
        return files.enter_context(writer.array_file(name_of(name), shape, rows.dtype))

    with contextlib.ExitStack() as files, ThreadPoolExecutor(1, thread_name_prefix="files") as thread:
        unit = UnitFiles(open_file, thread)
        yield unit
        unit.finish()


class UnitFiles:
    """Takes the rows of a unit's arrays, in order; made by `unit_files`."""

    def __init__(
        self, open_file: Callable[[str, np.ndarray], ArrayWriter], thread: ThreadPoolExecutor
    ) -> None:
        self._open_file, self._thread = open_file, thread
        self._arrays: dict[str, ArrayWriter] = {}
        self._pending: deque[Future[None]] = deque()

    def put(self, rows: Mapping[str, np.ndarray]) -> None:
        """The next rows of every array. Waits while the thread is more than a few batches behind.

        Raises:
            OSError: a row that was put before could not be written.
        """
        self._pending.append(self._thread.submit(self._write, rows))
        while len(self._pending) > _BATCHES_BEHIND:
            self._pending.popleft().result()

    def finish(self) -> None:
        """Wait until all rows are written. Raises as `put`."""
        while self._pending:
            self._pending.popleft().result()

    def _write(self, rows: Mapping[str, np.ndarray]) -> None:
        if not self._arrays:
            # The last one opened is the first to be closed and recorded.
            for name in reversed([name for name in ARRAYS if name in rows]):
                self._arrays[name] = self._open_file(name, rows[name])
        for name, array in rows.items():
            self._arrays[name].append(array)
