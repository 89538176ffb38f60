"""The world is a value: rank and size, read from the launcher's environment once at the edge, then passed on.

Launchers differ in the names they use (Open MPI, PMI, Slurm, torchrun, DeepSpeed); no launcher at all is a
world of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlpmem_ds.core.errors import UserError

# (rank, size, local rank) in the order of trust. Slurm comes last and counts only inside a step of several
# tasks: a plain python in an sbatch script sees SLURM_NTASKS of the job although it is one process.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the processes of one run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    is_on_first_host: bool = True
    """with rank 0, as far as the launcher says"""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise UserError(
                f"rank {self.rank} is not in a world of {self.size}: check the launcher's variables"
            )

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def world_from_environment(environment: Mapping[str, str]) -> World:
    """Find rank, size and local rank in a launcher's variables; a world of one where there are none.

    Raises:
        UserError: a variable is present but is not a number, or the rank is outside the world.
    """
    for rank_name, size_name, local_name in _LAUNCHERS:
        if rank_name in environment and size_name in environment:
            try:
                rank, size = int(environment[rank_name]), int(environment[size_name])
                local_rank = int(environment.get(local_name, rank))
            except ValueError as error:
                raise UserError(
                    f"the launcher's {rank_name}={environment[rank_name]!r},"
                    f" {size_name}={environment[size_name]!r} are not numbers: unset them or start through a"
                    " launcher"
                ) from error
            # A rank's number among those of its host is its number among all on the first host alone, for
            # the ranks below it are then there too.
            return World(rank=rank, size=size, local_rank=local_rank, is_on_first_host=rank == local_rank)
    return World()
