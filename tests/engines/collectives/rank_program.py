"""Ranks that exchange with each other, for the tests: `rank_program.py HOW SIZE SCENARIO FOLDER`.

Started once for all ranks, which it forks; under a launcher once for each. Each rank leaves
what its scenario gives in FOLDER/result-RANK.
"""

import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np

from mlpmem_ds.core.world import World, world_from_environment
from mlpmem_ds.engines.collectives import pairwise
from mlpmem_ds.engines.collectives.opening import open_ranks
from mlpmem_ds.engines.collectives.ranks import Ranks, RanksLost

TIMEOUT_SECONDS = 3.0
pairwise.MESSAGE_BYTES = 40  # every array travels in pieces


def everything(ranks: Ranks) -> dict:
    """Every operation; of three ranks one is slower than the time limit."""
    if ranks.rank == 1 and ranks.size == 3:
        time.sleep(TIMEOUT_SECONDS + 1)
    numbers = [ranks.next_number("units") for _ in range(20)]
    parts = [np.full((to, 1 + ranks.rank), 10 * ranks.rank + to, np.int16) for to in range(ranks.size)]
    return {
        "sum": ranks.sum(np.arange(100, dtype=np.int64).reshape(4, 25) * (ranks.rank + 1)),
        "small sum": ranks.sum(np.ones(1, np.int32)),
        "no sum": ranks.sum(np.ones((0, 3), np.int64)),
        "values": ranks.gather({"rank": ranks.rank, "many": np.arange(ranks.rank * 50)}),
        "parts": ranks.exchange(parts),
        "floats": ranks.exchange([np.full((), ranks.rank, np.float32)] * ranks.size),
        "numbers": numbers,
        "other": ranks.next_number("other") >= 0,
        "waited": ranks.wait(),
    }


def killed(ranks: Ranks) -> dict:
    """A rank is gone without a word: the others learn which one."""
    ranks.wait()
    if ranks.rank == 1:
        os._exit(0)
    ranks.sum(np.ones(3))
    return {}


def killed_in_transfer(ranks: Ranks, victim: int = 1) -> dict:
    """A rank is gone without a word when all have met: it is the transfer that fails."""
    ranks.wait()
    if ranks.rank == victim:
        ranks.wait()
        os._exit(0)
    ranks.sum(np.ones(3))
    return {}


def keeper_killed_in_transfer(ranks: Ranks) -> dict:
    return killed_in_transfer(ranks, victim=0)


def failed(ranks: Ranks) -> dict:
    """A rank ends with an error: the others learn of it at once."""
    if ranks.rank == 1:
        raise KeyError("mine")
    ranks.sum(np.ones(3))
    return {}


def keeper_gone(ranks: Ranks) -> dict:
    """Rank 0, which may keep the counters, is gone without a word: the others need a number."""
    ranks.wait()
    time.sleep(1 + ranks.rank)  # all have left the wait by then
    if ranks.rank == 0:
        os._exit(0)
    return {"number": ranks.next_number("units")}


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        everything,
        killed,
        killed_in_transfer,
        keeper_killed_in_transfer,
        failed,
        keeper_gone,
    )
}


def run(world: World, how: str, scenario: str, folder: Path) -> None:
    limit = 600.0 if scenario == "failed" or "in_transfer" in scenario else TIMEOUT_SECONDS
    shared, start = folder / "exchange", time.monotonic()
    try:
        with open_ranks(world, how, os.environ, folder=shared, timeout_seconds=limit) as ranks:  # type: ignore[arg-type]
            result = SCENARIOS[scenario](ranks)
    except RanksLost as error:
        result = {"lost": error.ranks, "said": str(error), "seconds": time.monotonic() - start}
    except KeyError:
        result = {}
    result["left"] = shared.exists() and world.is_first
    (folder / f"result-{world.rank}").write_bytes(pickle.dumps(result))


def main() -> None:
    how, size, scenario, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    if how in ("mpi", "auto"):
        world = world_from_environment(os.environ)
        assert world.size == size
        return run(world, how, scenario, folder)
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            run(World(rank=rank, size=size, local_rank=rank), how, scenario, folder)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
