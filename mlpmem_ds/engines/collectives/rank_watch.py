"""Signs of life over the network, while the ranks do anything else: a host that is cut off is noticed within
a minute or two, and named.

A collective of NCCL or gloo waits for its own time limit where the other side is silent and its connection
stays open, as after a cut link or a host that was switched off; and that limit must be long, because a rank
may be at a long step, a checkpoint or a compilation. So a thread of each rank gives a sign of life every two
seconds, through the store in which the ranks met, and looks at the next rank's. A rank that is slow gives
signs; one whose signs have stopped for the time limit, by the clock of the rank that looks, is lost. The main
thread may be inside a library for as long as the connection lives, so the process is ended from here.

Each rank asks for two keys each time, for any number of ranks; who finds a lost one tells the others. No key
is asked for that may not be there: the store would wait for it, and a rank may die before its first sign.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlpmem_ds.core.claims import has_ended, holder
from mlpmem_ds.core.errors import LOST_RANK, first_line
from mlpmem_ds.core.faults import is_lost_rank
from mlpmem_ds.core.log import log_end
from mlpmem_ds.core.streams import say
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.ranks import RanksLost

SECONDS_BETWEEN_SIGNS = 2.0
_SIGNS_PER_LIMIT = 10
_SECONDS_TO_JOIN, _SECONDS_BETWEEN_LOOKS = 1.0, 0.1
_LOST, _BEATS_TO_BE_HEARD = "lost", 2.5

End = Callable[[RanksLost], None]


def keeper_in_words(environment: Mapping[str, str]) -> str:
    """Who keeps the store in which the ranks meet, where it is not rank 0: torchrun's agent."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return ""
    return f"the launcher on {environment.get('MASTER_ADDR', 'the first host')}"


def read_known(store: Any, keys: Sequence[str]) -> list[str]:
    """The values of these keys of a store, "" for one that no rank has set: asked for it, the store would
    wait for its whole time limit.

    Two calls where all are there. Where some are not, the list is halved: about three calls for each doubling
    of its length where one is missing, or the ranks of one host; twice as many as keys at most.
    """
    if store.check(list(keys)):
        return [value.decode() for value in store.multi_get(list(keys))]
    if len(keys) == 1:
        return [""]
    middle = len(keys) // 2
    return read_known(store, keys[:middle]) + read_known(store, keys[middle:])


def end_process(error: RanksLost) -> None:
    """As `core.front_end` ends it, from another thread. What is half written is removed by the next start."""
    say(f"error: {error}")
    log_end(LOST_RANK, str(error))
    os._exit(LOST_RANK)


class RankWatch:
    """Two threads: one talks to the store, which may not answer; the other looks at how long that takes.

    Args:
        store: that all ranks share, for this object alone: a call may block for ever.
        world: this rank.
        timeout_seconds: without a sign of life, until a rank is lost.
        grace_seconds: more, for a main thread that looks at the signs itself.
        keeper: who keeps the store, in words; "" = rank 0.
        end: called once, from a thread, with what was lost.
    """

    def __init__(
        self,
        store: Any,
        world: World,
        *,
        timeout_seconds: float,
        grace_seconds: float = 0.0,
        keeper: str = "",
        end: End = end_process,
    ) -> None:
        self._store, self._world, self._end = store, world, end
        self._limit = timeout_seconds + grace_seconds
        self._every = min(timeout_seconds / _SIGNS_PER_LIMIT, SECONDS_BETWEEN_SIGNS)
        self._next = (world.rank + 1) % world.size
        self._stopping, self._lock = threading.Event(), threading.Lock()
        self._answered = self._heard = time.monotonic()
        self._sign_of_next, self._told = "", ""
        store.set(f"host/{world.rank}", socket.gethostname())
        store.set(f"process/{world.rank}", holder(os.getpid()))
        store.set(f"sign/{world.rank}", "0")
        self._keeper, self._host_of_rank_0 = keeper, self._read("host/0")
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._judge)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Give no signs any more, and look at none; before the rank leaves."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(_SECONDS_TO_JOIN)

    # -- the thread that talks

    def _talk(self) -> None:
        number = 0
        while not self._stopping.wait(self._every):
            number += 1
            with contextlib.suppress(RuntimeError):  # the store is gone: the other thread sees no answer
                self._store.set(f"sign/{self._world.rank}", str(number))
                sign = self._read(f"sign/{self._next}")
                told = self._read(_LOST)
                self._host_of_rank_0 = self._host_of_rank_0 or self._read("host/0")
                with self._lock:
                    now = time.monotonic()
                    self._answered, self._told = now, told
                    if sign != self._sign_of_next:
                        self._sign_of_next, self._heard = sign, now

    def _read(self, key: str) -> str:
        return read_known(self._store, [key])[0]

    # -- the thread that judges

    def _judge(self) -> None:
        while not self._stopping.wait(self._every):
            with self._lock:
                now, told = time.monotonic(), self._told
                answered, heard = now - self._answered, now - self._heard
            if told:
                return self._leave(_lost_as_told(told))
            how = f"has shown no sign of life for {self._limit:.0f} s"
            if answered > self._limit:
                return self._leave(self._without_keeper(f"{how}, and with it the way to the others"))
            if heard > self._limit and answered < self._limit / 2:
                with contextlib.suppress(RuntimeError):  # the keeper of the store is gone too: look again
                    silent = self.silent_ranks()
                    if self._next in silent:
                        return self._leave(self._tell(silent, how))

    def _leave(self, error: RanksLost) -> None:
        if not self._stopping.is_set():
            self._end(error)

    def _tell(self, ranks: list[int], how: str) -> RanksLost:
        """Let the others hear of it before this process, which may keep the store, is gone."""
        hosts = self._hosts_of(ranks)
        with contextlib.suppress(RuntimeError):
            self._store.set(_LOST, json.dumps([how, list(hosts.items())]))
        time.sleep(_BEATS_TO_BE_HEARD * self._every)
        return RanksLost(ranks, how, hosts=hosts)

    # -- who it is

    def silent_ranks(self) -> list[int]:
        """The ranks that give no sign while this one looks, for three times as long as one takes; those of
        this machine whose processes have ended as soon as that is seen."""
        ranks = range(self._world.size)
        processes = read_known(self._store, [f"process/{rank}" for rank in ranks])
        keys = [f"sign/{rank}" for rank in ranks]
        before = read_known(self._store, keys)
        deadline = time.monotonic() + 3 * self._every
        while time.monotonic() < deadline:
            if ended := [rank for rank in ranks if has_ended(processes[rank])]:
                return ended
            time.sleep(min(_SECONDS_BETWEEN_LOOKS, self._every))
        after = read_known(self._store, keys)
        return [rank for rank, signs in enumerate(zip(before, after, strict=True)) if signs[0] == signs[1]]

    def _hosts_of(self, ranks: list[int]) -> dict[int, str]:
        return {rank: self._read(f"host/{rank}") for rank in ranks}

    def _without_keeper(self, how: str) -> RanksLost:
        if self._keeper:
            return RanksLost([], how, who=self._keeper)
        return RanksLost([0], how, hosts={0: self._host_of_rank_0})

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Within, an error of a library that says no more than that a connection broke names the rank."""
        try:
            yield
        except RuntimeError as error:
            if not is_lost_rank(error):
                raise
            reason = first_line(error).split(". This is typically caused")[0]  # gloo's own advice
            try:
                silent = self.silent_ranks()
                hosts = self._hosts_of(silent)
            except RuntimeError:  # the keeper is gone
                raise self._without_keeper(f"is gone ({reason})") from error
            raise RanksLost(silent, f"is gone ({reason})", hosts=hosts) from error


def _lost_as_told(told: str) -> RanksLost:
    how, hosts = json.loads(told)
    return RanksLost([rank for rank, _ in hosts], how, hosts=dict(hosts))
