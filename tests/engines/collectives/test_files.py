"""Ranks that share a folder: every operation, a slow rank, one that is killed, one that fails."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlpmem_ds.core.host import host_name
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.files import SharedFolder
from mlpmem_ds.engines.collectives.ranks import RanksLost


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_exchange_and_three_wait_for_a_slow_one(run_ranks, check_everything, size):
    check_everything(run_ranks("files", size, "everything"))


def test_a_killed_rank_is_named(run_ranks):
    results = run_ranks("files", 3, "killed")[::2]
    assert [result["lost"] for result in results] == [(1,), (1,)]
    # Who sees it first tells the other.
    assert any(f"rank 1 on {host_name()} has ended" in result["said"] for result in results)
    assert all(result["seconds"] < 20 for result in results)


def test_a_rank_that_fails_ends_the_others_at_once(run_ranks):
    for result in run_ranks("files", 3, "failed")[::2]:
        assert result["lost"] == (1,) and f"rank 1 on {host_name()} has failed" in result["said"]
        assert result["seconds"] < 20


def test_a_rank_that_goes_on_alone_ends_those_that_wait(tmp_path):
    """It removes the folder, maybe while they list it."""

    def open_rank(rank):
        return SharedFolder(World(rank=rank, size=2), tmp_path / "exchange", timeout_seconds=20)

    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(open_rank, range(2)))
        waits = pool.submit(ranks[0].gather, 1)
        while not list((tmp_path / "exchange").glob("*/1/0")):
            assert not waits.done()
        shutil.rmtree(tmp_path / "exchange")
        with pytest.raises(RanksLost, match="rank 1 has gone on alone"):
            waits.result(timeout=15)
    with pytest.raises(RanksLost, match="another rank has gone on alone"):
        ranks[1].gather(2)
    with pytest.raises(RanksLost, match="another rank has gone on alone"):
        ranks[1].next_number("units")
    for rank in ranks:
        rank.fail()


def test_a_launch_of_more_ranks_follows_one_that_was_killed(tmp_path):
    """The last rank is there before rank 0, and sees what the killed launch left."""

    def open_rank(rank, size):
        return SharedFolder(World(rank=rank, size=size), tmp_path / "exchange", timeout_seconds=20)

    with ThreadPoolExecutor(3) as pool:
        former = [pool.submit(open_rank, rank, 2) for rank in range(2)]
        for rank in former:
            rank.result(timeout=15)._heartbeat.stop()
        last = pool.submit(open_rank, 2, 3)
        while not last.done() and not list((tmp_path / "exchange").glob("*/hello-2")):
            pass
        time.sleep(0.1)
        ranks = [*pool.map(open_rank, range(2), [3, 3]), last.result(timeout=15)]
        assert [found.result(timeout=15) for found in [pool.submit(rank.gather, 1) for rank in ranks]] == [
            [1, 1, 1]
        ] * 3
    for rank in ranks:
        rank.fail()
