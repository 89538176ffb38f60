import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World, world_from_environment


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, World()),
        (
            {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
            World(rank=3, size=8, local_rank=1, is_on_first_host=False),
        ),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, World(rank=1, size=2, local_rank=1)),
        ({"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}, World(rank=0, size=4)),
        (
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "1"},
            World(rank=5, size=6, local_rank=1, is_on_first_host=False),
        ),
        # srun --mpi=pmi2, tasks dealt to two nodes in turn: the rank says nothing of the place on its node
        (
            {"PMI_RANK": "8", "PMI_SIZE": "16", "SLURM_PROCID": "8", "SLURM_LOCALID": "4"},
            World(rank=8, size=16, local_rank=4, is_on_first_host=False),
        ),
        # by hand in a batch script, which is task 0 itself
        (
            {"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            World(rank=3, size=8, local_rank=3),
        ),
        # a plain python in a batch script of eight tasks is a world of one
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, World()),
        # neither is one in the shell of an allocation, nor one with variables that are empty
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}, World()),
        ({"RANK": "", "WORLD_SIZE": "", "OMPI_COMM_WORLD_RANK": "", "SLURM_PROCID": "3"}, World()),
        # torchrun inside mpirun: the nearest launcher counts
        (
            {"RANK": "1", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
            World(rank=1, size=2, local_rank=1),
        ),
    ],
)
def test_world_from_environment(environment: dict[str, str], expected: World) -> None:
    assert world_from_environment(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "x"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"},
        {"RANK": "1"},
        {"WORLD_SIZE": "2", "RANK": ""},
    ],
)
def test_wrong_variables_are_the_users_to_mend(environment: dict[str, str]) -> None:
    with pytest.raises(UserError):
        world_from_environment(environment)


def test_a_rank_knows_whether_it_is_on_the_host_of_rank_0() -> None:
    """Four ranks on two hosts, dealt host by host and in turn."""
    for local_ranks, on_first in (([0, 1, 0, 1], [0, 1]), ([0, 0, 1, 1], [0])):
        worlds = [
            world_from_environment({"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(local_rank)})
            for rank, local_rank in enumerate(local_ranks)
        ]
        assert [world.rank for world in worlds if world.is_on_first_host] == on_first
    assert world_from_environment({"RANK": "3", "WORLD_SIZE": "4"}).is_on_first_host  # not told


STEP = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "local_size", "shares_host"),
    [
        ({}, None, False),
        # torchrun, deepspeed, Open MPI, MPICH
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, 2, True),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, 1, False),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_SIZE": "4"}, 4, True),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            2,
            True,
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, 2, True),
        # Slurm: of the step, also where the rank is in other variables
        ({**STEP, "SLURM_STEP_NUM_NODES": "4"}, 1, False),
        ({**STEP, "SLURM_STEP_NUM_NODES": "3"}, 2, True),
        ({**STEP, "RANK": "0", "WORLD_SIZE": "4", "SLURM_STEP_NUM_NODES": "2"}, 2, True),
        ({**STEP, "PMI_RANK": "0", "PMI_SIZE": "4", "SLURM_STEP_NUM_NODES": "2"}, 2, True),
        # torchrun as the one task of each node
        (
            {**STEP, "RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2", "SLURM_STEP_NUM_NODES": "4"},
            2,
            True,
        ),
        # by hand, in a batch script too: only who is not the first of its host knows
        ({"RANK": "0", "WORLD_SIZE": "2"}, None, False),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, None, True),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, None, False),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
            | {"SLURM_STEP_NUM_NODES": "1"},
            None,
            False,
        ),
        # of another launcher than that of the rank, or no number
        ({"RANK": "0", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, None, False),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "many"}, None, False),
    ],
)
def test_a_rank_knows_whether_it_shares_its_host(
    environment: dict[str, str], local_size: int | None, shares_host: bool
) -> None:
    world = world_from_environment(environment)
    assert (world.local_size, world.shares_host) == (local_size, shares_host)
