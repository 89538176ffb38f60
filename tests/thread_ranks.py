"""Ranks that are threads of this process, for tests of what ranks do together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class ThreadRank:
    """A rank among threads: what `engines.collectives` gives a process, but for counters and endings."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._table = rank, size, barrier, table

    def gather(self, value: Any) -> list[Any]:
        self._table[self.rank] = value
        self._barrier.wait()
        values = list(self._table)
        self._barrier.wait()
        return values

    def sum(self, array: np.ndarray) -> np.ndarray:
        return np.sum(self.gather(array), axis=0, dtype=array.dtype)

    def exchange(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        assert len(parts) == self.size and all(part.dtype.names is None for part in parts)
        return [sent[self.rank].copy() for sent in self.gather(list(parts))]


def on_thread_ranks(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """What `work` gives on each of so many ranks; an error of one ends the others and is raised here."""
    barrier, table = threading.Barrier(size, timeout=60), [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRank(rank, size, barrier, table))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:  # the first is the cause, the others saw the barrier break
        raise errors[0]
    return results
