"""Part of `train` and `train_base`: the ranks find each other, under any launcher."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.rank_watch import RankWatch, keeper_in_words
from mlpmem_ds.engines.collectives.ranks import RANK_TIMEOUT_SECONDS
from mlpmem_ds.engines.deepspeed.library import import_deepspeed
from mlpmem_ds.engines.devices import device_of_rank, gpu_number, identity_of
from mlpmem_ds.engines.processes import (
    has_group,
    join_store,
    keep_freed_memory,
    leave_process_group,
    meeting_point,
    start_waiting_group,
    wait_for_all,
)

_SHARED_GPUS = "NCCL_MULTI_RANK_GPU_ENABLE"
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
        UserError: the ranks cannot find each other (MASTER_ADDR is unknown), or two of them have one GPU.
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
    store = join_store(world, os.environ, timeout) if world.size > 1 else None
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        if store is not None:
            refuse_shared_gpus(store, world, identity_of(device_of_rank("auto", world)))
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )
    atexit.register(leave_process_group)
    start_waiting_group(world, timeout)
    if store is not None:
        _watch = RankWatch(
            store,
            world,
            timeout_seconds=rank_timeout_seconds,
            keeper=keeper_in_words(os.environ),
        )
        atexit.register(_watch.stop)


def refuse_shared_gpus(store: Any, world: World, gpu: str) -> None:
    """Let every rank know the GPUs of all: NCCL connects no two ranks on one, but where its own variable
    allows it (MIG). It would say so in words that are also those of a lost rank, after which a supervisor
    starts all of them again.

    Args:
        store: that all ranks share.
        world: this rank.
        gpu: identity of its GPU.

    Raises:
        UserError: two ranks have one GPU; on every rank.
    """
    own = f"{socket.gethostname()}, {gpu}"
    places = [place.decode() for place in _told_by_all(store, world, "gpu", own)]
    counts = Counter(places)
    place, count = counts.most_common(1)[0]
    if count == 1 or os.environ.get(_SHARED_GPUS) == "1":
        return
    with contextlib.suppress(RuntimeError):  # rank 0 may keep the store: it waits until all have read
        _told_by_all(store, world, "has seen the GPUs", "")
    ranks = [str(rank) for rank, of in enumerate(places) if of == place]
    raise UserError(
        f"ranks {', '.join(ranks)} of {world.size} have one GPU ({place}), and a training needs one"
        f" for each rank: start {len(counts)} (torchrun --nproc-per-node), or let each see its own"
    )


def _told_by_all(store: Any, world: World, what: str, value: str) -> list[bytes]:
    """What each rank says, in rank order; waits for all."""
    names = [f"{what}/{rank}" for rank in range(world.size)]
    store.set(names[world.rank], value)
    store.wait(names)
    told: list[bytes] = store.multi_get(names)
    return told


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
