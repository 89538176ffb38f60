"""The environment of processes that a test starts: ours, without what a launcher has left there."""

from __future__ import annotations

import os

_OF_LAUNCHERS = (
    *("OMPI_", "PMIX_", "PRTE_", "PMI_", "MASTER_", "SLURM_", "TORCHELASTIC_"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
)


def environment_without_launchers() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
