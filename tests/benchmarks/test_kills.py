"""Runs under kill -9: the schedule is the seed's, kills hit ranks alone, and what is left is counted."""

import signal
import sys
from itertools import islice
from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.kills import Kill, ranks_of, run_under_kills, schedule
from mlpmem_ds.core.errors import UserError

# A rank that ends well at its third start, and is started again by its parent, which is no rank itself.
LAUNCHER = """
import os, subprocess, sys
rank = 'import sys, time; open("starts", "a").write("x"); n = len(open("starts").read());'
rank += 'time.sleep(60 if n < 3 else 0)'
os.environ["RANK"] = "0"
while code := subprocess.run([sys.executable, "-c", rank]).returncode:
    print(code, flush=True)
"""


def test_the_schedule_is_that_of_the_seed_and_its_second_kill_is_of_all_ranks() -> None:
    first, again, other = (list(islice(schedule(5.0, seed), 4)) for seed in (0, 0, 1))
    assert first == again != other
    assert [kill.seconds for kill in first] == [5.0] * 4
    assert [kill.is_whole for kill in first] == [False, True, False, False]


def test_ranks_are_killed_until_the_launch_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    looks = iter(range(10))
    done = run_under_kills(
        [([sys.executable, "-c", LAUNCHER], {})],
        iter([Kill(seconds=at, choice=0.5, is_whole=False) for at in (0.5, 0.1)]),
        log=tmp_path / "log",
        look=lambda: {"look": next(looks)},
    )
    assert [kill["ranks"] for kill in done.kills] == [[0], [0]]
    assert [kill["look"] for kill in done.kills] == [0, 1]
    assert done.orphans == 0 and done.seconds >= 0.6
    assert (tmp_path / "log").read_text().split() == [str(-signal.SIGKILL)] * 2


def test_processes_that_outlive_their_launch_are_counted_and_ended(tmp_path: Path) -> None:
    command = (["bash", "-c", "setsid sleep 600 & exit 0"], {})
    assert run_under_kills([command], iter(()), log=tmp_path / "log", look=dict).orphans == 1
    assert ranks_of("MLPMEM_GOODPUT=none") == {}


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exit code 3 .no such thing."):
        run_under_kills(
            [(["bash", "-c", "echo no such thing; exit 3"], {})], iter(()), log=tmp_path / "log", look=dict
        )
