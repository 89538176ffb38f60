"""Part of `plan`: what it gives no time for, and why."""

from __future__ import annotations

from mlpmem_ds.maths.listed_keys import ID_AND_NORM_BYTES
from mlpmem_ds.stages.planning.workload import Machine, Workload
from mlpmem_ds.stages.retrieval.list_owners import SHARE_OF_MEMORY

MAX_POSITIONS = 200_000_000_000
"""the largest size at which `bench scale` counts what ranks read, open and keep"""


def limit_of(stage: str, work: Workload, machine: Machine) -> str | None:
    """Why the seconds of a stage cannot be planned, as `not supported above N: …`; None where they can."""
    if work.positions > MAX_POSITIONS:
        return f"not supported above {MAX_POSITIONS:.0e} positions: nothing larger has been counted"
    if stage == "targets" and work.search == "ivf" and machine.gpus:
        each = work.dim * work.key_dtype.itemsize + ID_AND_NORM_BYTES
        most = SHARE_OF_MEMORY * machine.gpus * machine.gpu_bytes / each
        if work.positions > most:
            return (
                f"not supported above {most:.1e} positions on {machine.gpus} GPUs: their memory does not hold"
                " all keys, which would be read from the host, or the disk, at each call"
            )
    return None
