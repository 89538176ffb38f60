"""Long waits: a rank that works for an hour shows signs of life from a thread, and the others wait for it;
one that shows none for the time limit is lost.

Signs are compared by the clock of the rank that waits: two looks at one sign, never the clocks of two hosts.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable

from mlpmem_ds.engines.collectives.ranks import RanksLost

_logger = logging.getLogger(__name__)
_SIGNS_PER_LIMIT = 10
_MAX_SECONDS_BETWEEN_LOOKS = 5.0
_FIRST_PAUSE_SECONDS, _PAUSE_GROWTH = 0.0005, 1.5
_SECONDS_BETWEEN_LINES = 60.0
_MAX_RANKS_NAMED = 8


class Heartbeat:
    """A thread that gives a sign of life several times in each time limit, and at least every
    `longest_pause_seconds`."""

    def __init__(
        self,
        give_sign: Callable[[int], None],
        timeout_seconds: float,
        longest_pause_seconds: float = math.inf,
    ) -> None:
        self._give_sign = give_sign
        self._every = min(timeout_seconds / _SIGNS_PER_LIMIT, longest_pause_seconds)
        self._stopping = threading.Event()
        give_sign(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stopping.wait(self._every):
            number += 1
            with contextlib.suppress(Exception):  # the connection is away: the others will say so
                self._give_sign(number)

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()


def wait_until(
    is_over: Callable[[], bool],
    *,
    awaited: Callable[[], Iterable[int]],
    sign_of: Callable[[int], str],
    timeout_seconds: float,
    longest_pause_seconds: float,
    has_ended: Callable[[int], bool] = lambda rank: False,
    host_of: Callable[[int], str] = lambda rank: "",
) -> None:
    """Look again and again, less often the longer it takes, until it is over.

    Args:
        is_over: raises RanksLost where a rank has said that it failed.
        awaited: the ranks that are not there yet.
        sign_of: a rank's last sign of life; any text that changes while it lives.
        has_ended: whether a rank's process is known to be gone; then its time limit is not waited for.
        host_of: a rank's host, to be named; "" where it is not known.

    Raises:
        RanksLost: an awaited rank has ended, or gave the same sign for the whole time limit.
    """
    pause, looked, said = _FIRST_PAUSE_SECONDS, time.monotonic(), time.monotonic()
    signs: dict[int, tuple[str, float]] = {}
    while not is_over():
        now = time.monotonic()
        if now - looked > min(timeout_seconds / _SIGNS_PER_LIMIT, _MAX_SECONDS_BETWEEN_LOOKS):
            looked, missing = now, list(awaited())
            for rank in missing:
                sign = sign_of(rank)
                if rank not in signs or signs[rank][0] != sign:
                    signs[rank] = sign, now
            ended = [rank for rank in missing if has_ended(rank)]
            if ended and not is_over():
                raise _lost(ended, "has ended", host_of)
            lost = [rank for rank in missing if now - signs[rank][1] > timeout_seconds]
            if lost and not is_over():
                raise _lost(lost, f"has shown no sign of life for {timeout_seconds:.0f} s", host_of)
            if missing and now - said > _SECONDS_BETWEEN_LINES:
                said, named = now, ", ".join(str(rank) for rank in missing[:_MAX_RANKS_NAMED])
                silent_seconds = max(now - signs[rank][1] for rank in missing)
                _logger.info(
                    "waiting for %d ranks: %s; the last sign of life from each is at most %.0f s old"
                    " (one is lost after %.0f s)",
                    len(missing),
                    named,
                    silent_seconds,
                    timeout_seconds,
                )
        time.sleep(pause)
        pause = min(pause * _PAUSE_GROWTH, longest_pause_seconds)


def _lost(ranks: list[int], how: str, host_of: Callable[[int], str]) -> RanksLost:
    return RanksLost(ranks, how, hosts={rank: host_of(rank) for rank in ranks[:_MAX_RANKS_NAMED]})
