"""The flags of `fit_scaling`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.stages.shared_flags import refuse_repeated


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Fit perplexity to parameters and compute, for a decoder alone and for decoder and memory.

    Power laws of the loss in nats, loss = a x^-b, and with four sizes or more also with a constant that no
    size removes; exponents with 95 % intervals over documents.
    """

    example: ClassVar[str] = "python tools/fit_scaling.py --preset tiny --output runs/scaling"

    output: Path = option("directory of scaling.json and scaling.png, and with --preset of all stages")
    preset: Literal["tiny", "small"] | None = option("train these sizes on the preset's text", None)
    reports: tuple[Path, ...] = option(
        "report directories of evaluate, of bases that train_base made, each with --memory, on one text",
        (),
        metavar="DIR",
    )
    jobs: int | None = option("stages that run at once (default: the machine's cores)", None, at_least=1)
    page: Path | None = option(
        "page to write too, such as docs/RESULTS.md: the result goes into the folder results next to it", None
    )

    def check(self) -> None:
        if (self.preset is None) == (not self.reports):
            raise UserError("give either --preset, which trains the sizes, or --reports that there are")
        refuse_repeated(self.reports, flag="--reports")
        if self.preset is None:
            self.refuse_unused("jobs", of="--preset")
