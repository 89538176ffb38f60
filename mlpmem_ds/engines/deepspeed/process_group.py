"""Part of `train` and `train_base`: the ranks find each other, under any launcher."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
from collections.abc import Iterator

import torch

from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.rank_watch import RankWatch, keeper_in_words
from mlpmem_ds.engines.collectives.ranks import RANK_TIMEOUT_SECONDS
from mlpmem_ds.engines.deepspeed.library import import_deepspeed
from mlpmem_ds.engines.devices import gpu_number
from mlpmem_ds.engines.processes import (
    has_group,
    join_store,
    keep_freed_memory,
    leave_process_group,
    meeting_point,
    start_waiting_group,
    wait_for_all,
)

_watch: RankWatch | None = None  # of this process, whose group is its only one


def set_up_distributed(
    world: World,
    *,
    timeout: datetime.timedelta = datetime.timedelta(minutes=30),
    rank_timeout_seconds: float = RANK_TIMEOUT_SECONDS,
) -> None:
    """Start the process group (NCCL with CUDA, else gloo), also of one rank.

    `timeout` ends a collective of a step that a live rank does not join; ranks that wait for files do so in a
    group without such a limit (`start_waiting_group`). A rank that has ended or was cut off is found by its
    signs of life (`RankWatch`), within `rank_timeout_seconds` and some more. All of it is left when the
    process ends. A second call only puts the rank into the environment again, where DeepSpeed looks for it
    later too.

    Raises:
        UserError: the ranks cannot find each other: MASTER_ADDR is unknown.
    """
    global _watch
    # DeepSpeed takes LOCAL_RANK for the number of a GPU, in three places, also where a rank sees one alone.
    local_rank = gpu_number(world) if torch.cuda.is_available() else world.local_rank
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(local_rank))
    if has_group():
        return
    deepspeed = import_deepspeed()
    address, port = meeting_point(world, os.environ)
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    keep_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )
    atexit.register(leave_process_group)
    start_waiting_group(world, timeout)
    if world.size > 1:
        _watch = RankWatch(
            join_store(world, os.environ, timeout),
            world,
            timeout_seconds=rank_timeout_seconds,
            keeper=keeper_in_words(os.environ),
        )
        atexit.register(_watch.stop)


@contextlib.contextmanager
def named_ranks() -> Iterator[None]:
    """What the ranks of a group do together: the error of a connection that broke becomes `RanksLost` with
    the rank and its host."""
    with contextlib.nullcontext() if _watch is None else _watch.naming():
        yield


@contextlib.contextmanager
def watched_ranks(world: World) -> Iterator[None]:
    """The same for the last that they do: they leave together, at the end."""
    with named_ranks():
        yield
        if _watch is not None:
            wait_for_all(world)
    if _watch is not None:
        _watch.stop()
