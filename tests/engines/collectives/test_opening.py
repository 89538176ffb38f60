"""Which connection is chosen, under every launcher."""

import sys

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives import torch_group
from mlpmem_ds.engines.collectives.alone import Alone
from mlpmem_ds.engines.collectives.opening import open_ranks

TWO = World(rank=0, size=2)


@pytest.fixture
def opened(monkeypatch):
    """The connections that were opened, by name; none is real."""
    names = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def __call__(self, world, *_, timeout_seconds):
            names.append(self.name)
            return Alone()

    monkeypatch.setattr(torch_group, "TorchGroup", Fake("torch"))
    fake_mpi = type(sys)("mlpmem_ds.engines.collectives.mpi")
    fake_mpi.MpiRanks = Fake("mpi")
    monkeypatch.setitem(sys.modules, fake_mpi.__name__, fake_mpi)
    return names


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, []),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ["mpi"]),
        ({"PMI_RANK": "0", "SLURM_PROCID": "0"}, ["mpi"]),  # srun --mpi=pmi2
        ({"SLURM_PROCID": "0"}, []),  # srun without an MPI
        ({"SLURM_PROCID": "0", "MASTER_ADDR": "node1"}, ["torch"]),
        ({"RANK": "0", "MASTER_ADDR": "node1"}, ["torch"]),  # torchrun
        ({"RANK": "0", "MASTER_ADDR": "node1", "PMIX_RANK": "0"}, ["torch"]),  # torchrun inside mpirun
    ],
)
def test_auto_is_what_the_launcher_offers(opened, environment, expected):
    open_ranks(TWO, "auto", environment)
    assert opened == expected


def test_without_mpi4py_auto_takes_torch_and_mpi_says_what_to_install(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlpmem_ds.engines.collectives.mpi", None)  # its import fails
    open_ranks(TWO, "auto", {"PMIX_RANK": "0", "MASTER_ADDR": "node1"})
    assert opened == ["torch"]
    with pytest.raises(UserError, match=r"pip install '.\[mpi\]'"):
        open_ranks(TWO, "mpi", {})


def test_one_rank_and_none_connect_nothing(opened):
    assert isinstance(open_ranks(World(), "mpi", {}), Alone)
    assert isinstance(open_ranks(TWO, "none", {"MASTER_ADDR": "node1"}), Alone)
    assert opened == []


@pytest.mark.parametrize(
    ("how", "launcher"), [("mpi", "mpirun"), ("torch", "torchrun"), ("files", "WORLD_SIZE")]
)
def test_one_rank_that_was_to_be_connected_hears_how_ranks_are_started(opened, caplog, how, launcher):
    with caplog.at_level("WARNING"):
        open_ranks(World(), how, {})
    assert f"--exchange {how}: this is the only rank" in caplog.text and launcher in caplog.text


@pytest.mark.parametrize("how", ["auto", "none"])
def test_one_rank_that_asked_for_nothing_hears_nothing(opened, caplog, how):
    open_ranks(World(), how, {})
    assert not caplog.records
