"""Part of `train` and `train_base`: the ranks find each other, under any launcher."""

from __future__ import annotations

import atexit
import datetime
import os

import torch

from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.library import import_deepspeed
from mlpmem_ds.engines.devices import gpu_number
from mlpmem_ds.engines.processes import (
    has_group,
    keep_freed_memory,
    leave_process_group,
    meeting_point,
    start_waiting_group,
)


def set_up_distributed(world: World, *, timeout: datetime.timedelta = datetime.timedelta(minutes=10)) -> None:
    """Start the process group (NCCL with CUDA, else gloo), also of one rank.

    `timeout` ends a collective of a step that a rank does not join; ranks that wait for files do so in a
    group without such a limit (`start_waiting_group`). Both are left when the process ends. A second call
    only puts the rank into the environment again, where DeepSpeed looks for it later too.

    Raises:
        UserError: the ranks cannot find each other: MASTER_ADDR is unknown.
    """
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
