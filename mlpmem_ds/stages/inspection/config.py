"""The flags of `inspect_run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.output_files import check_output_file
from mlpmem_ds.stages.shared_flags import MAX_THREADS


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Look at a run directory (or one stage's): what is in it, complete or not, every checksum.

    Exit code 2 where something is damaged. With --watch: how far every stage is, until Ctrl-C. With
    --discard: throw away what is broken, and what was made from it.
    """

    example: ClassVar[str] = "python tools/inspect_run.py run"

    run: Path = option(
        "run directory, or one stage's, checkpoint's or export's directory", metavar="RUN", positional=True
    )
    checksums: bool = option("read every file and compare its checksum; without, sizes only", True)
    threads: int | None = option(
        "that read and hash at once (default: one a core, at most eight)",
        None,
        at_least=1,
        at_most=MAX_THREADS,
    )
    output: Path | None = option("also write what was found to this JSON file", None, metavar="FILE")
    watch: float | None = option(
        "show how far every stage is, every SECONDS (10 without a number), until Ctrl-C",
        None,
        above=0,
        at_most=86_400,
        implied=10.0,
        metavar="SECONDS",
    )
    prometheus: Path | None = option(
        "write how far every stage is to this *.prom file of node-exporter's text collector, once or in each"
        " round of --watch; compares no files",
        None,
        metavar="FILE",
    )
    discard: str | None = option(
        "say what goes with this unit (STAGE/UNIT), or with a stage or checkpoint: its files, and what was"
        " made from it",
        None,
        metavar="UNIT",
    )
    yes: bool = option("with --discard: do it", False)
    keep_dependents: bool = option(
        "with --discard: leave what was made from it; the unit must then come out with the same bytes", False
    )

    def check(self) -> None:
        if self.discard is None:
            self.refuse_unused("yes", "keep_dependents", of="--discard")
        if self.discard is not None and not self.discard.strip("/"):
            raise UserError("--discard names nothing: give STAGE/UNIT, or a stage's or checkpoint's name")
        looks = self.watch is not None or self.prometheus is not None
        if looks and (self.discard is not None or self.output is not None):
            raise UserError(
                "--watch and --prometheus look on while stages run: give --discard or --output without them"
            )
        if self.discard is not None and self.output is not None:
            raise UserError("--output is written of what was found: give it without --discard")
        self._refuse_comparing()
        files = {"output": "found.json", "prometheus": "run.prom"}
        for name, example in files.items():  # before hours of checksums, and not after them
            path: Path | None = getattr(self, name)
            if path is not None:
                check_output_file(path, flag=f"--{name}", example=example)

    def _refuse_comparing(self) -> None:
        """
        Raises:
            UserError: flags of the comparison of files, with one that compares none.
        """
        others, unused = self.given("watch", "prometheus", "discard"), self.given("threads", "checksums")
        if others and unused:
            compare = "compares" if len(others) == 1 else "compare"
            raise UserError(
                f"{' and '.join(others)} {compare} no files: leave out {' and '.join(unused)}, or run the"
                " command once for each"
            )
