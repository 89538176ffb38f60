"""Real ranks of mpirun: every operation, a slow rank, one that fails."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mpi4py")
MPIRUN = Path(sys.executable).parent / "mpirun"
LAUNCHER = [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n"]

pytestmark = pytest.mark.skipif(not MPIRUN.is_file(), reason="mpirun is not installed")


@pytest.mark.parametrize(("how", "size"), [("mpi", 3), ("auto", 2)])
def test_ranks_exchange_and_three_wait_for_a_slow_one(run_ranks, check_everything, how, size):
    check_everything(run_ranks(how, size, "everything", launcher=[*LAUNCHER, str(size)]))


def test_a_rank_that_fails_ends_the_others(run_ranks):
    assert run_ranks("mpi", 2, "failed", launcher=[*LAUNCHER, "2"], code=2)[0] == {}


def test_an_mpi_for_one_thread_is_refused():
    """In a process of its own: importing the module starts MPI."""
    code = (
        "from mlpmem_ds.core.errors import UserError\n"
        "from mlpmem_ds.core.world import World\n"
        "from mlpmem_ds.engines.collectives import mpi\n"
        "mpi.MPI.Query_thread = lambda: mpi.MPI.THREAD_FUNNELED\n"
        "try: mpi.MpiRanks(World(), timeout_seconds=1)\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MPI_THREAD_SERIALIZED" in done.stdout
