"""Part of `plan`: what it gives no time for, and why."""

from __future__ import annotations

from mlpmem_ds.stages.planning.workload import Machine, Workload

MAX_POSITIONS = 200_000_000_000
"""the largest size at which `bench scale` counts what ranks read, open and keep"""
SHARE_OF_MEMORY = 0.6
"""of a GPU's, or a host's, that groups of lists may take (stages/retrieval/list_owners.py)"""
BYTES_BESIDE_KEY = 12
"""its id and its squared length"""


def limit_of(stage: str, work: Workload, machine: Machine) -> str | None:
    """Why the seconds of a stage cannot be planned, as `not supported above N: …`; None where they can."""
    if work.positions > MAX_POSITIONS:
        return f"not supported above {MAX_POSITIONS:.0e} positions: nothing larger has been counted"
    if stage == "targets" and work.search == "ivf" and machine.gpus:
        each = work.dim * work.key_dtype.itemsize + BYTES_BESIDE_KEY
        most = SHARE_OF_MEMORY * machine.gpus * machine.gpu_bytes / each
        if work.positions > most:
            return (
                f"not supported above {most:.1e} positions on {machine.gpus} GPUs: their memory does not hold"
                " all keys, which would be read from the host, or the disk, at each call"
            )
    return None
