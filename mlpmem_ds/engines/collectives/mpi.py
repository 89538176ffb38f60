"""The only file that imports mpi4py: ranks that mpirun or srun started, connected by MPI.

MPI's own waits keep a core busy, so a rank asks again with pauses until all have got to an operation.
Importing this module starts MPI. A rank that fails ends the job when its process ends: in MPI no rank can
leave alone, and mpirun ends the others where one is killed.

A counter is a pair of numbers in the memory of rank 0 that every rank reads and adds to by one-sided access
(MPI_Fetch_and_op): rank 0 computes meanwhile.
"""

from __future__ import annotations

import atexit
import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from mlpmem_ds.core.errors import LOST_RANK, REFUSED, LostRankError, UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives import pairwise
from mlpmem_ds.engines.collectives.rank_watch import RankWatch
from mlpmem_ds.engines.collectives.ranks import Array, Ranks, RanksLost

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, _PAUSE_GROWTH = 0.0002, 0.1, 1.5
_PROGRESS_SECONDS = 0.01
_NUM_COUNTERS = 1024


class MpiRanks(Ranks):
    """All ranks of the launch, in a communicator of their own."""

    def __init__(self, world: World, *, timeout_seconds: float) -> None:
        if MPI.COMM_WORLD.Get_size() != world.size:
            raise UserError(
                f"the launcher started {world.size} ranks, and MPI sees {MPI.COMM_WORLD.Get_size()}: it is"
                " not the MPI of mpi4py; with srun try --mpi=pmix, or choose another --exchange"
            )
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:  # on a GPU the next call is searched in a thread
            raise UserError(
                "this MPI may be called from its first thread only, and the ranks exchange from others too:"
                " take an MPI that allows MPI_THREAD_SERIALIZED, or --exchange torch or files"
            )
        self.rank, self.size = world.rank, world.size
        self._timeout_seconds = timeout_seconds
        self._comm = MPI.COMM_WORLD.Split(0, world.rank)
        self._counters = _Counters(self._comm)
        self.watch: RankWatch | None = None

    def sum(self, array: Array) -> Array:
        self.wait()
        result = np.empty_like(array, order="C")
        source, target = np.ascontiguousarray(array).reshape(-1), result.reshape(-1)
        for piece in pairwise.slices(len(source), array.itemsize):
            self._finish([self._comm.Iallreduce(source[piece], target[piece])])
        return result

    def gather(self, value: Any) -> list[Any]:
        self.wait()
        return pairwise.gather(value, self.rank, self.size, self._swap)

    def exchange(self, parts: Sequence[Array]) -> list[Array]:
        assert len(parts) == self.size, (len(parts), self.size)
        self.wait()
        return pairwise.exchange(parts, self.rank, self._swap)

    def next_number(self, counter: str) -> int:
        return self._counters.next_number(counter)

    def wait(self) -> None:
        request, pause = self._comm.Ibarrier(), _FIRST_PAUSE_SECONDS
        while not request.Test():
            time.sleep(pause)
            pause = min(pause * _PAUSE_GROWTH, _LONGEST_PAUSE_SECONDS)

    def close(self) -> None:
        self.wait()
        if self.watch is not None:
            self.watch.stop()
        self._counters.close()
        self._comm.Free()

    def fail(self, error: BaseException | None = None) -> None:
        """The others are ended when this process ends: after its message has been written."""
        if self.watch is not None:
            self.watch.stop()
        code = LOST_RANK if isinstance(error, LostRankError) else REFUSED
        atexit.register(MPI.COMM_WORLD.Abort, code)

    def _swap(self, outgoing: Array, to: int, incoming: Array, source: int) -> None:
        requests = [self._comm.Irecv(incoming, source)] if len(incoming) else []
        requests += [self._comm.Isend(outgoing, to)] if len(outgoing) else []
        self._finish(requests)

    def _finish(self, requests: Sequence[Any]) -> None:
        """All ranks are in this transfer, so MPI is asked without a pause, which would slow it."""
        deadline = time.monotonic() + self._timeout_seconds
        while not MPI.Request.Testall(requests):
            if time.monotonic() > deadline:
                raise RanksLost([], f"did not answer within {self._timeout_seconds:.0f} s")
            time.sleep(0)


class _Counters:
    """A table of (hash of the name, count) in the memory of rank 0; a name takes the first free row from its
    hash on."""

    def __init__(self, comm: Any) -> None:
        self._row_of_name: dict[str, int] = {}
        num_bytes = 16 * _NUM_COUNTERS if comm.Get_rank() == 0 else 0
        self._window = MPI.Win.Allocate(num_bytes, 8, comm=comm)
        if num_bytes:
            np.asarray(self._window.tomemory()).view(np.int64)[:] = 0
        comm.Barrier()
        self._window.Lock_all()
        self._stop_progress = _keep_mpi_moving(comm) if num_bytes else lambda: None

    def next_number(self, name: str) -> int:
        if name not in self._row_of_name:
            self._row_of_name[name] = self._row(name)
        one, number = np.ones(1, np.int64), np.empty(1, np.int64)
        self._window.Fetch_and_op(one, number, 0, 2 * self._row_of_name[name] + 1, MPI.SUM)
        self._window.Flush(0)
        return int(number[0])

    def _row(self, name: str) -> int:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        key = np.array([int.from_bytes(digest, "big") >> 1 | 1], np.int64)
        free, found = np.zeros(1, np.int64), np.empty(1, np.int64)
        for step in range(_NUM_COUNTERS):
            row = (int(key[0]) + step) % _NUM_COUNTERS
            self._window.Compare_and_swap(key, free, found, 0, 2 * row)
            self._window.Flush(0)
            if found[0] in (0, key[0]):
                return row
        raise AssertionError(f"more than {_NUM_COUNTERS} counters")

    def close(self) -> None:
        self._stop_progress()
        self._window.Unlock_all()
        self._window.Free()


def _keep_mpi_moving(comm: Any) -> Callable[[], None]:
    """Where the network cannot reach into a rank's memory by itself, MPI does so when that rank calls it: let
    a thread do that while the rank computes. Returns what stops it."""
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        return lambda: None
    stopping = threading.Event()

    def run() -> None:
        while not stopping.wait(_PROGRESS_SECONDS):
            comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def stop() -> None:
        stopping.set()
        thread.join()

    return stop
