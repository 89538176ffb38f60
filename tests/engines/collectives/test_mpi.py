"""Real ranks of mpirun: every operation, a slow rank, one that fails."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("mpi4py")
MPIRUN = Path(sys.executable).parent / "mpirun"
LAUNCHER = [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n"]

pytestmark = pytest.mark.skipif(not MPIRUN.is_file(), reason="mpirun is not installed")


@pytest.mark.parametrize(("how", "size"), [("mpi", 3), ("auto", 2)])
def test_ranks_exchange_and_wait_for_a_slow_one(run_ranks, check_everything, how, size):
    check_everything(run_ranks(how, size, "everything", launcher=[*LAUNCHER, str(size)]))


def test_a_rank_that_fails_ends_the_others(run_ranks):
    assert run_ranks("mpi", 2, "failed", launcher=[*LAUNCHER, "2"], code=2)[0] == {}
