"""Part of `plan`: where no number can be stood for, and why."""

from __future__ import annotations

from mlpmem_ds.stages.planning.sizes_on_disk import list_bytes
from mlpmem_ds.stages.planning.workload import Machine, Workload

MAX_POSITIONS = 200_000_000_000
"""the largest size at which `bench scale` counts what ranks read, open and keep"""
_SHARE_OF_GPU = 0.5  # of its memory, that keys may lie in (maths/device_memory.py)


def limit_of(stage: str, work: Workload, machine: Machine) -> str | None:
    """Why the seconds of a stage cannot be planned, as `not supported above N: …`; None where they can."""
    if work.positions > MAX_POSITIONS:
        return f"not supported above {MAX_POSITIONS:.0e} positions: nothing larger has been counted"
    if stage == "targets" and work.search == "ivf" and machine.gpus:
        room = _SHARE_OF_GPU * machine.gpus * machine.gpu_bytes
        if list_bytes(work) > room:
            most = work.positions * room / list_bytes(work)
            return (
                f"not supported above {most:.1e} positions on {machine.gpus} GPUs: their memory does not hold"
                " the keys in list order"
            )
    return None
