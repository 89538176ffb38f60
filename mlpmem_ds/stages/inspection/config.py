"""The flags of `inspect_run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.core.config import Flags, option


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Look at a run directory (or one stage's): what is in it, complete or not, every checksum.

    Exit code 2 where something is damaged.
    """

    example: ClassVar[str] = "python tools/inspect_run.py run"

    run: Path = option(
        "run directory, or one stage's, checkpoint's or export's directory", metavar="RUN", positional=True
    )
    checksums: bool = option("read every file and compare its checksum; without, sizes only", True)
    threads: int | None = option(
        "that read and hash at once (default: one a core, at most eight)", None, at_least=1
    )
    output: Path | None = option("also write what was found to this JSON file", None, metavar="FILE")
