"""A rank that is cut off is named in words within the time limit; one that is slow is not."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Collection
from pathlib import Path

import pytest

from mlpmem_ds.core.claims import holder
from mlpmem_ds.core.errors import LOST_RANK
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.rank_watch import RankWatch, keeper_in_words, read_known
from mlpmem_ds.engines.collectives.ranks import RanksLost

ROOT = Path(__file__).parents[3]
LIMIT = 1.5


class Store:
    """A key-value store in this process; `cut` holds back every call, as a network that is gone does. Who
    asks for a key that is not there waits for the store's own time limit, as with torch's."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.whole = threading.Event()
        self.whole.set()

    def set(self, key: str, value: str) -> None:
        self.whole.wait(20)
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self.whole.wait(20)
        deadline = time.monotonic() + 20
        while key not in self.values:
            if time.monotonic() > deadline:
                raise RuntimeError(f"wait timeout after 20000ms, keys: {key}")
            time.sleep(0.01)
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        self.whole.wait(20)
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]


class Watched:
    """Some ranks with a watch each; what each was told at the end."""

    def __init__(self, size: int, *, keeper: str = "", dead: Collection[int] = ()) -> None:
        self.stores = [Store() for _ in range(size)]
        for store in self.stores[1:]:
            store.values = self.stores[0].values  # one store, a connection each
        self.ends: dict[int, RanksLost] = {}
        self.watches = [
            RankWatch(
                self.stores[rank],
                World(rank=rank, size=size),
                timeout_seconds=LIMIT,
                keeper=keeper,
                end=lambda error, rank=rank: self.ends.setdefault(rank, error),
            )
            for rank in range(size)
            if rank not in dead
        ]

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 20
        while len(self.ends) < count and time.monotonic() < deadline:
            time.sleep(0.01)

    def stop(self) -> None:
        for store in self.stores:
            store.whole.set()
        for watch in self.watches:
            watch.stop()


def test_a_rank_that_is_cut_off_is_named_to_all_with_its_host() -> None:
    ranks = Watched(4)
    start = time.monotonic()
    ranks.stores[2].whole.clear()  # no sign of it reaches the store any more
    ranks.wait_for(4)
    ranks.stop()
    assert {rank: error.ranks for rank, error in ranks.ends.items()} == {0: (2,), 1: (2,), 2: (0,), 3: (2,)}
    said = str(ranks.ends[0])
    assert f"rank 2 on {socket.gethostname()} has shown no sign of life for {LIMIT:.0f} s" in said
    assert "run the same" in said
    assert "and with it the way to the others" in str(ranks.ends[2])
    assert time.monotonic() - start < 15  # of a machine that may be busy


@pytest.mark.parametrize("dead", [0, 2])
def test_a_rank_that_died_before_its_first_sign_is_named_within_the_time_limit(dead: int) -> None:
    """The store does not have its keys, and would wait for them."""
    start = time.monotonic()
    ranks = Watched(3, dead=[dead])
    ranks.wait_for(2)
    ranks.stop()
    assert {rank: error.ranks for rank, error in ranks.ends.items()} == {
        rank: (dead,) for rank in range(3) if rank != dead
    }
    assert time.monotonic() - start < 15


def test_keys_that_no_rank_has_set_are_empty_and_not_waited_for() -> None:
    store, asked = Store(), []
    check = store.check
    store.check = lambda keys: asked.append(keys) or check(keys)  # type: ignore[method-assign, func-returns-value]
    store.set("sign/0", "7")
    start = time.monotonic()
    assert read_known(store, ["sign/0", "sign/1"]) == ["7", ""]
    store.set("sign/1", "8")
    asked.clear()
    assert read_known(store, ["sign/0", "sign/1"]) == ["7", "8"] and len(asked) == 1
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("missing", [[], [0], [999], [500], range(496, 504), range(1000)])
def test_few_keys_that_are_missing_take_few_calls(missing: Collection[int]) -> None:
    """Every rank of a thousand asks one store."""
    store, asked = Store(), []
    check = store.check
    store.check = lambda keys: asked.append(keys) or check(keys)  # type: ignore[method-assign, func-returns-value]
    values = [str(number) if number not in missing else "" for number in range(1000)]
    for number, value in enumerate(values):
        if value:
            store.set(f"sign/{number}", value)
    assert read_known(store, [f"sign/{number}" for number in range(1000)]) == values
    assert len(asked) <= (50 if len(missing) < 10 else 2000)


def test_a_store_that_fails_once_ends_no_watch() -> None:
    ranks = Watched(3)
    failures = []
    multi_get = ranks.stores[0].multi_get

    def failing_once(keys: list[str]) -> list[bytes]:
        if not failures:
            failures.append(keys)
            raise RuntimeError("Connection reset by peer")
        return multi_get(keys)

    ranks.stores[0].multi_get = failing_once  # type: ignore[method-assign]
    ranks.stores[1].whole.clear()
    ranks.wait_for(3)
    ranks.stop()
    assert failures and ranks.ends[0].ranks == (1,)


def test_ranks_that_live_are_never_called_lost_however_long_they_do_something_else() -> None:
    ranks = Watched(3)
    time.sleep(1.5 * LIMIT)
    ranks.stop()
    assert ranks.ends == {}


def test_a_rank_that_has_left_looks_no_more() -> None:
    ranks = Watched(2)
    ranks.watches[1].stop()
    ranks.watches[0].stop()
    time.sleep(1.5 * LIMIT)
    assert ranks.ends == {}


def test_a_process_of_this_machine_that_has_ended_is_known_without_waiting_for_its_signs() -> None:
    ranks = Watched(3)
    gone = subprocess.Popen(["true"])
    gone.wait()
    ranks.stores[0].values["process/1"] = holder(gone.pid).encode()
    assert ranks.watches[0].silent_ranks() == [1]  # its signs go on
    ranks.stop()


def test_where_the_launcher_keeps_the_store_it_is_named() -> None:
    keeper = keeper_in_words({"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "node1"})
    assert keeper_in_words({"MASTER_ADDR": "node1"}) == ""
    ranks = Watched(2, keeper=keeper)
    for store in ranks.stores:
        store.whole.clear()
    ranks.wait_for(2)
    ranks.stop()
    assert all("the launcher on node1 has shown" in str(error) for error in ranks.ends.values())


def test_an_error_of_a_library_gets_the_name_of_the_rank_that_is_gone() -> None:
    ranks = Watched(3)
    ranks.stores[1].whole.clear()
    said = r"rank 1 on .* is gone \(.*Connection closed by peer"
    with pytest.raises(RanksLost, match=said), ranks.watches[0].naming():
        raise RuntimeError("[gloo] Connection closed by peer [10.0.0.2]:4711")
    with pytest.raises(RuntimeError, match="mat1 and mat2"), ranks.watches[0].naming():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    ranks.stop()


PROGRAM = r"""
import os, signal, sys, torch
from mlpmem_ds.core.front_end import guarded
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.process_group import set_up_distributed, watched_ranks

def act(_):
    world = World(rank=int(sys.argv[1]), size=2, local_rank=int(sys.argv[1]))
    set_up_distributed(world, rank_timeout_seconds=float(sys.argv[2]))
    with watched_ranks(world):
        torch.distributed.all_reduce(torch.ones(1))
        print("met", flush=True)
        if sys.argv[3] == "stopped" and world.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        if sys.argv[3] == "killed" and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.all_reduce(torch.ones(1))
    return 0

sys.exit(guarded(act, prog="look"))
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [("stopped", "rank 1 on .* has shown no sign of life for 4 s"), ("killed", r"rank 1 on .* is gone \(")],
)
def test_a_collective_of_a_training_ends_with_a_line_that_names_the_rank(
    what: str, said: str, forked_commands: Path
) -> None:
    """A process that is stopped is as a host whose link is cut: its connections stay open and are silent."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [forked_commands / "python", "-c", PROGRAM, str(rank), "4", what],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, errors = ranks[0].communicate(timeout=120)
    finally:
        ranks[1].send_signal(signal.SIGKILL)
        ranks[1].communicate()
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert ranks[0].returncode == LOST_RANK and len(lines) == 1, errors
    assert "Traceback" not in errors
    assert re.search(said, lines[0]) and "run the same command again" in lines[0]
