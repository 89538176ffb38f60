"""Real gloo ranks: every operation, a slow rank, one that is killed, one that fails."""

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives import torch_group
from mlpmem_ds.engines.collectives.ranks import RanksLost

HERE = f"on {socket.gethostname()}"


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_exchange_and_three_wait_for_a_slow_one(run_ranks, check_everything, size):
    check_everything(run_ranks("torch", size, "everything"))


def test_ranks_of_torchrun_find_each_other(run_ranks, check_everything):
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--no-python"]
    check_everything(run_ranks("auto", 2, "everything", launcher=torchrun))


def test_a_killed_rank_is_named(run_ranks):
    results = run_ranks("torch", 3, "killed")[::2]
    assert [result["lost"] for result in results] == [(1,), (1,)]
    assert any("no sign of life" in result["said"] for result in results)  # who sees it first tells the other
    assert all(result["seconds"] < 20 for result in results)


def test_a_rank_that_is_killed_in_a_transfer_is_named_within_seconds(run_ranks):
    """Long before the time limit of ten minutes: who lives gives signs every two seconds."""
    results = run_ranks("torch", 3, "killed_in_transfer")[::2]
    assert [result["lost"] for result in results] == [(1,), (1,)], results
    # Who sees it first tells the other.
    assert any(f"rank 1 {HERE} is gone (" in result["said"] for result in results)
    assert all(result["seconds"] < 30 for result in results)


def test_the_keeper_that_is_killed_in_a_transfer_is_named(run_ranks):
    for result in run_ranks("torch", 3, "keeper_killed_in_transfer")[1:]:
        assert result["lost"] == (0,) and result["seconds"] < 30, result


def test_a_rank_that_fails_ends_the_others_at_once(run_ranks):
    for result in run_ranks("torch", 3, "failed")[::2]:
        assert result["lost"] == (1,) and f"rank 1 {HERE} has failed" in result["said"]
        assert result["seconds"] < 20


def test_a_number_of_a_counter_whose_keeper_is_gone(run_ranks):
    (result,) = run_ranks("torch", 2, "keeper_gone")[1:]
    assert result["lost"] == (0,) and f"rank 0 {HERE} is gone, and with it" in result["said"]


class GoneStore:
    """Of a keeper that is gone at the call with this number: no later one is answered."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("Connection reset by peer. This is typically caused by")
            return {"add": 2, "clone": self, "check": True, "get": b"one", "multi_get": [b"1", b"1"]}.get(
                name
            )

        return call


@pytest.mark.parametrize("number", range(6))
def test_a_keeper_that_is_gone_while_the_others_arrive_is_named(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """At each call: at its arrival, in the wait, at the watch, and at the last question."""
    monkeypatch.setattr(torch_group, "join_store", lambda *_: GoneStore(number))
    monkeypatch.setattr(torch_group, "start_gloo_group", lambda *_: None)
    monkeypatch.setattr(torch_group, "RankWatch", lambda *_, **__: None)
    said = r"^rank 0 is gone, and with it the store in which the ranks meet \(Connection reset by peer\)"
    with pytest.raises(RanksLost, match=said) as lost:
        torch_group.TorchGroup(World(rank=1, size=2), {}, timeout_seconds=600)
    assert lost.value.ranks == (0,)
