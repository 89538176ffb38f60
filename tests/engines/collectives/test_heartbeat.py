"""What a rank says while it waits, and when it stops waiting."""

import itertools
import re
import threading
import time

import pytest

from mlpmem_ds.engines.collectives import heartbeat
from mlpmem_ds.engines.collectives.ranks import RanksLost


def test_a_silent_rank_is_not_called_alive_and_is_lost_after_the_limit(caplog, monkeypatch):
    monkeypatch.setattr(heartbeat, "_SECONDS_BETWEEN_LINES", 0.1)
    signs = itertools.count()
    with caplog.at_level("INFO"), pytest.raises(RanksLost, match="rank 3 on node7 has shown no sign of life"):
        heartbeat.wait_until(
            lambda: False,
            awaited=lambda: [1, 3],
            sign_of=lambda rank: str(next(signs)) if rank == 1 else "always the same",
            timeout_seconds=0.5,
            longest_pause_seconds=0.01,
            host_of=lambda rank: {3: "node7"}.get(rank, ""),
        )
    lines = [record.message for record in caplog.records]
    assert lines and all("waiting for 2 ranks: 1, 3" in line and "alive" not in line for line in lines)
    assert all(re.search(r"at most \d+ s old \(one is lost after", line) for line in lines)


def test_a_rank_that_has_ended_is_lost_long_before_the_limit(monkeypatch):
    monkeypatch.setattr(heartbeat, "_MAX_SECONDS_BETWEEN_LOOKS", 0.1)
    start = time.monotonic()
    with pytest.raises(RanksLost, match="rank 2 has ended") as caught:
        heartbeat.wait_until(
            lambda: False,
            awaited=lambda: [1, 2],
            sign_of=lambda rank: "always the same",
            has_ended=lambda rank: rank == 2,
            timeout_seconds=600,
            longest_pause_seconds=0.01,
        )
    assert caught.value.ranks == (2,) and time.monotonic() - start < 30


def test_signs_are_at_most_so_far_apart_however_long_the_limit_is():
    seen, three = [], threading.Event()

    def give_sign(number):
        seen.append(number)
        if number == 3:
            three.set()

    thread = heartbeat.Heartbeat(give_sign, 600.0, 0.01)
    assert three.wait(10)
    thread.stop()
    assert seen[:4] == [0, 1, 2, 3]
