"""Part of `prepare_corpus`: map over pieces of the input, in one process or several, in their order."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_TASKS_AHEAD = 4  # a process, so that none waits while the results of one before it are written
_WORTH_BYTES = 8 << 20  # of text: below, starting processes takes longer than they save


def choose_processes(requested: int | None, world: World, num_bytes: int) -> int:
    """The number of processes: as requested, else the machine's cores for a single rank, else one."""
    if requested is not None:
        return requested
    if world.size > 1 or num_bytes < _WORTH_BYTES or "fork" not in multiprocessing.get_all_start_methods():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """A number of processes; one is this process itself. Close it, or use it in a `with`.

    They are forked at the first task, so that they share what this process holds (a tokenizer of any kind)
    without pickling it, and import nothing again.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._executor: ProcessPoolExecutor | None = None
        if processes > 1:
            context = multiprocessing.get_context("fork")
            self._executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin)
            gc.freeze()  # looking through the libraries' objects for garbage takes a tenth of a second

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            gc.unfreeze()

    def map(self, function: Callable[[_Task], _Result], tasks: Iterable[_Task]) -> Iterator[_Result]:
        """What `function` (of a module's top level) makes of each task, in their order.

        Raises:
            UserError: a process was killed. What `function` raises is raised here, for the first task that
                failed.
        """
        if self._executor is None:
            yield from map(function, tasks)
            return
        waiting: deque[Future[_Result]] = deque()
        try:
            for task in tasks:
                waiting.append(self._executor.submit(function, task))
                if len(waiting) >= _TASKS_AHEAD * self._processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"one of the {self._processes} processes was killed, perhaps because memory ran out: run the"
                " same command again, with fewer --processes"
            ) from error


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent alone answers
    gc.freeze()  # the collector leaves the parent's objects alone, so that their memory stays shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
