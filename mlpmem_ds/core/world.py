"""The world is a value: rank and size, read from the launcher's environment once at the edge, then passed on.

Launchers differ in the names they use (Open MPI, PMI, Slurm, torchrun, DeepSpeed); no launcher at all is a
world of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlpmem_ds.core.errors import UserError

# (rank, size, local rank) in the order of trust. Slurm comes last and counts only inside a step of several
# tasks: a plain python in an sbatch script sees SLURM_NTASKS of the job although it is one process. The PMI
# that it offers to MPI programs has no local rank; then Slurm's own says it, of a task with the same rank.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
# Of the launcher that gave the rank: ranks of this host. torchrun and deepspeed give RANK.
_LOCAL_SIZES = {
    "RANK": ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    "OMPI_COMM_WORLD_RANK": ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    "PMI_RANK": ("MPI_LOCALNRANKS",),
}


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the processes of one run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    is_on_first_host: bool = True
    """with rank 0, as far as the launcher says"""
    local_size: int | None = None
    """ranks on this host, of Slurm those of a host on the average, rounded up; None: the launcher does not
    say"""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise UserError(
                f"rank {self.rank} is not in a world of {self.size}: check the launcher's variables"
            )

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def shares_host(self) -> bool:
        """Whether another rank is on this host, as far as the launcher says."""
        return self.local_rank > 0 if self.local_size is None else self.local_size > 1


def world_from_environment(environment: Mapping[str, str]) -> World:
    """Find rank, size and local rank in a launcher's variables; a world of one where there are none.

    Raises:
        UserError: a variable is present but is not a number, the rank is outside the world, or of RANK and
            WORLD_SIZE one is missing.
    """
    if bool(environment.get("RANK")) != bool(environment.get("WORLD_SIZE")):
        present, missing = ("RANK", "WORLD_SIZE") if environment.get("RANK") else ("WORLD_SIZE", "RANK")
        raise UserError(
            f"{present}={environment[present]} is set and {missing} is not: set both, unset {present} for one"
            " process, or start through a launcher"
        )
    for rank_name, size_name, local_name in _LAUNCHERS:
        if environment.get(rank_name) and environment.get(size_name):
            is_task = environment.get("SLURM_PROCID") == environment[rank_name]
            local_names = (local_name, "SLURM_LOCALID") if is_task else (local_name,)
            names = (rank_name, size_name, *[name for name in local_names if environment.get(name)][:1])
            shown = ", ".join(f"{name}={environment[name]!r}" for name in names)
            try:
                rank, size, *rest = (int(environment[name]) for name in names)
            except ValueError as error:
                raise UserError(
                    f"the launcher's {shown} are not numbers: unset them or start through a launcher"
                ) from error
            local_rank = rest[0] if rest else rank
            if not 0 <= rank < size or local_rank < 0:
                raise UserError(
                    f"the launcher's {shown} do not fit: ranks count from 0 to {size_name} - 1; unset them or"
                    " start through a launcher"
                )
            # A rank's number among those of its host is its number among all on the first host alone:
            # the ranks below it are then there too.
            return World(
                rank=rank,
                size=size,
                local_rank=local_rank,
                is_on_first_host=rank == local_rank,
                local_size=_local_size(environment, rank_name, size, is_task=is_task),
            )
    return World()


def _local_size(environment: Mapping[str, str], rank_name: str, size: int, *, is_task: bool) -> int | None:
    """`World.local_size`. A number that cannot be read counts as none.

    Args:
        environment: the launcher's variables.
        rank_name: the variable that gave the rank.
        size: of the world.
        is_task: whether the rank is that of a task of Slurm, whose step is then looked at too.
    """
    for name in _LOCAL_SIZES.get(rank_name, ()):
        if (count := _count_in(environment, name)) is not None:
            return count
    tasks, nodes = (_count_in(environment, f"SLURM_STEP_NUM_{what}") for what in ("TASKS", "NODES"))
    return -(-size // nodes) if is_task and nodes is not None and tasks == size else None


def _count_in(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() and int(value) > 0 else None
