"""Ranks connected by torch.distributed (gloo, over TCP) and by its key-value store, which rank 0 or the
launcher keeps.

The group's own time limit would end every rank where one is slow, so ranks meet in the store first: it holds
how many have got to each operation, and signs of life (rank_watch.py), which are looked at in a wait and, by
a thread, where a call of a library does not come back.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mlpmem_ds.core.errors import first_line
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives import pairwise
from mlpmem_ds.engines.collectives.heartbeat import wait_until
from mlpmem_ds.engines.collectives.rank_watch import RankWatch, keeper_in_words, read_known
from mlpmem_ds.engines.collectives.ranks import Array, Ranks, RanksLost, culprits
from mlpmem_ds.engines.processes import (
    join_store,
    leave_process_group,
    start_gloo_group,
    sum_over_ranks,
    swap_with_ranks,
)

_LONGEST_PAUSE_SECONDS = 0.2
_SECONDS_TO_BE_HEARD = 1.0
_SECONDS_OF_A_TRANSFER = 1800.0  # all ranks are in it; one that is cut off in it is found by its signs
_SECONDS_FOR_THE_MAIN_THREAD = 10.0  # to find out for itself, which tells more than a thread can
_SECONDS_TO_LOOK = 5.0  # after a failed transfer: who lives gives a sign meanwhile
_SECONDS_TO_MEET = 1800.0  # one rank may start long after another


class TorchGroup(Ranks):
    """A gloo group of the whole world, in a process that is in no other group."""

    def __init__(
        self,
        world: World,
        environment: Mapping[str, str],
        *,
        timeout_seconds: float,
    ) -> None:
        self.rank, self.size = world.rank, world.size
        self._world, self._timeout_seconds = world, timeout_seconds
        self._store: Any = join_store(world, environment, datetime.timedelta(seconds=_SECONDS_TO_MEET))
        self._rank_0_keeps_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._operation, self._host_of_rank_0 = 0, ""
        self._arrive()
        self._wait_for_others(max(timeout_seconds, _SECONDS_TO_MEET))
        with self._transfer():
            self._watch = RankWatch(
                self._store.clone(),
                world,
                timeout_seconds=timeout_seconds,
                grace_seconds=_SECONDS_FOR_THE_MAIN_THREAD,
                keeper=keeper_in_words(environment),
            )
            start_gloo_group(self._store, world, datetime.timedelta(seconds=_SECONDS_OF_A_TRANSFER))
            self._host_of_rank_0 = self._host_of(0)  # known now: a rank's watch begins before it connects

    def sum(self, array: Array) -> Array:
        self.wait()
        result = array.copy()
        flat = torch.from_numpy(result.reshape(-1))
        with self._transfer():
            for piece in pairwise.slices(len(flat), array.itemsize):
                sum_over_ranks(flat[piece], self._world)
        return result

    def gather(self, value: Any) -> list[Any]:
        self.wait()
        with self._transfer():
            return pairwise.gather(value, self.rank, self.size, _swap)

    def exchange(self, parts: Sequence[Array]) -> list[Array]:
        assert len(parts) == self.size, (len(parts), self.size)
        self.wait()
        with self._transfer():
            return pairwise.exchange(parts, self.rank, _swap)

    def next_number(self, counter: str) -> int:
        with self._transfer():
            return int(self._store.add(f"counter/{counter}", 1)) - 1

    def wait(self) -> None:
        self._arrive()
        self._wait_for_others(self._timeout_seconds)

    def close(self) -> None:
        self.wait()
        self._arrive()
        if self.rank == 0:  # it may be the one that keeps the store
            self._wait_for_others(self._timeout_seconds)
        self._watch.stop()
        leave_process_group()

    def fail(self, error: BaseException | None = None) -> None:
        with contextlib.suppress(RuntimeError):  # the store's keeper may be gone
            number = int(self._store.add("failures", 1))
            self._store.set(f"failed/{number}", json.dumps(culprits(self.rank, error)))
        leave_process_group()  # ends the transfers that wait for this rank
        if self.rank == 0:  # the others ask the store meanwhile
            time.sleep(_SECONDS_TO_BE_HEARD)
        self._watch.stop()

    def _arrive(self) -> None:
        self._operation += 1
        with self._transfer():
            self._store.set(f"at/{self.rank}", str(self._operation))
            self._store.add("arrived", 1)

    def _wait_for_others(self, timeout_seconds: float) -> None:
        """Until all have arrived at this rank's operation."""

        def is_over() -> bool:
            if int(self._store.add("arrived", 0)) >= self._operation * self.size:
                return True
            if failed := self._failed():
                raise self._named(failed, "has failed")
            return False

        with self._transfer():
            wait_until(
                is_over,
                awaited=lambda: [
                    rank
                    for rank, operation in enumerate(self._of_all("at"))
                    if int(operation or 0) < self._operation
                ],
                sign_of=lambda rank: self._read(f"sign/{rank}"),
                timeout_seconds=timeout_seconds,
                longest_pause_seconds=_LONGEST_PAUSE_SECONDS,
                host_of=self._host_of,
            )

    def _failed(self) -> list[int]:
        """The ranks that those that failed have named."""
        count = int(self._store.add("failures", 0))
        if not count:
            return []
        said = read_known(self._store, [f"failed/{number}" for number in range(1, count + 1)])
        failures = [json.loads(ranks) for ranks in said if ranks]  # one has its number first
        return sorted({rank for ranks in failures for rank in ranks})

    def _lost(self, reason: str) -> RanksLost:
        """After a transfer failed: the ranks that another one has named, or that give no sign of life for
        some seconds, or the keeper of the store."""
        try:
            deadline, signs = time.monotonic() + _SECONDS_TO_LOOK, self._of_all("sign")
            while time.monotonic() < deadline:
                if failed := self._failed():
                    return self._named(failed, "has failed")
                time.sleep(_LONGEST_PAUSE_SECONDS)
            silent = [rank for rank, sign in enumerate(self._of_all("sign")) if sign == signs[rank]]
            return self._named([rank for rank in silent if rank != self.rank], f"is gone ({reason})")
        except RuntimeError:  # the store does not answer either
            if self._rank_0_keeps_store and self.rank > 0:
                how = f"is gone, and with it the store in which the ranks meet ({reason})"
                return RanksLost([0], how, hosts={0: self._host_of_rank_0})
            return RanksLost([], f"or the launcher is gone ({reason})")

    def _named(self, ranks: list[int], how: str) -> RanksLost:
        """With the hosts of the ranks."""
        return RanksLost(ranks, how, hosts={rank: self._host_of(rank) for rank in ranks})

    def _host_of(self, rank: int) -> str:
        """As its watch has written it (rank_watch.py); "" before that."""
        return self._read(f"host/{rank}")

    def _of_all(self, what: str) -> list[str]:
        """What each rank has written, such as its last sign of life; in few calls, since a thousand ranks may
        ask at once."""
        return read_known(self._store, [f"{what}/{rank}" for rank in range(self.size)])

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _read(self, key: str) -> str:
        return self._store.get(key).decode() if self._has(key) else ""

    @contextlib.contextmanager
    def _transfer(self) -> Iterator[None]:
        """What gloo and the store say when the other side is gone."""
        try:
            yield
        except RuntimeError as error:
            reason = first_line(error).split(". This is typically caused")[0]  # gloo's own advice
            raise self._lost(reason) from error


def _swap(outgoing: Array, to: int, incoming: Array, source: int) -> None:
    outgoing = np.require(outgoing, requirements="W")  # torch takes no read-only array
    swap_with_ranks(torch.from_numpy(outgoing), to, torch.from_numpy(incoming), source)
