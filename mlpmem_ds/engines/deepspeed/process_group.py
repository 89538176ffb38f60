"""Part of `train` and `train_base`: the ranks find each other, under any launcher."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.rank_watch import RankWatch, keeper_in_words
from mlpmem_ds.engines.collectives.ranks import RANK_TIMEOUT_SECONDS
from mlpmem_ds.engines.deepspeed.library import import_deepspeed, import_part
from mlpmem_ds.engines.devices import device_of_rank, gpu_number, identity_of
from mlpmem_ds.engines.processes import (
    group_maker,
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

    `timeout` ends a collective of a step that a live rank does not join, also in the groups that DeepSpeed
    makes later; ranks that wait for files do so in a group without such a limit (`start_waiting_group`). A
    rank that has ended or was cut off is found by its signs of life (`RankWatch`), within
    `rank_timeout_seconds` and some more. All of it is left when the process ends. A second call only puts the
    rank into the environment again, where DeepSpeed looks for it later too.

    Raises:
        UserError: the ranks cannot find each other (MASTER_ADDR is unknown), two of them have one GPU, or
            some have one and others have none.
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
        refuse_unequal_gpus(store, world, identity_of(device_of_rank("auto", world)))
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )
    # The ranks of an engine meet in groups of DeepSpeed's own, for which it names no timeout: NCCL's are then
    # of ten minutes.
    import_part("comm.comm").cdb.new_group = group_maker(timeout)
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


def refuse_unequal_gpus(store: Any, world: World, gpu: str) -> None:
    """Let every rank know the GPUs of all, and refuse what NCCL would not connect.

    It connects no two ranks on one GPU, but where its own variable allows it (MIG). It would say so in words
    that are also those of a lost rank, after which a supervisor starts all of them again. And a rank without
    a GPU would wait in a group of gloo's, which the others never join.

    Args:
        store: that all ranks share.
        world: this rank.
        gpu: identity of its GPU; "" on a CPU.

    Raises:
        UserError: two ranks have one GPU, or some have one and others have none; on every rank.
    """
    told = _told_by_all(store, world, "gpu", f"{socket.gethostname()}, {gpu}")
    fault = _fault_of_gpus([place.decode() for place in told])
    if fault is None:
        return
    with contextlib.suppress(RuntimeError):  # rank 0 may keep the store: it waits until all have read
        _told_by_all(store, world, "has seen the GPUs", "")
    raise UserError(fault)


def _fault_of_gpus(places: Sequence[str]) -> str | None:
    """Why ranks at these places, HOST, GPU each, do not train together, or None."""
    size, hosts_and_gpus = len(places), [place.rpartition(", ")[::2] for place in places]
    without = [rank for rank, (_, gpu) in enumerate(hosts_and_gpus) if not gpu]
    if len(without) == size:
        return None
    if without:
        hosts = sorted({hosts_and_gpus[rank][0] for rank in without})
        return (
            f"ranks {_listed(without)} of {size} (on {_listed(hosts)}) see no GPU, and the others do: see"
            " nvidia-smi and CUDA_VISIBLE_DEVICES there, and whether its torch is built for CUDA; or hide"
            " the GPUs from all (CUDA_VISIBLE_DEVICES=) to train on CPUs"
        )
    counts = Counter(places)
    shared, count = counts.most_common(1)[0]
    if count == 1 or os.environ.get(_SHARED_GPUS) == "1":
        return None
    ranks = [rank for rank, place in enumerate(places) if place == shared]
    return (
        f"ranks {_listed(ranks)} of {size} have one GPU ({shared}), and a training needs one for each rank:"
        f" start {len(counts)} (torchrun --nproc-per-node), or let each see its own"
    )


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


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
