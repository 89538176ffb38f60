"""What decides a directory of keys in list order; not a command of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlpmem_ds.core.config import Flags, option


@dataclass(frozen=True, kw_only=True)
class ListsConfig(Flags):
    """Besides its keys and index, which are its inputs."""

    output: Path = option("directory", identity="none")
    run_positions: int = option("positions of a run", at_least=1)
