"""The flags of `view_report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.output_files import check_output_file
from mlpmem_ds.formats.corpus import SPLITS
from mlpmem_ds.stages import shared_flags
from mlpmem_ds.stages.generation.options import JointOptions


@dataclass(frozen=True, kw_only=True)
class Config(JointOptions):
    """A report as a page to look at, with text token by token: who was right, and what else was likely."""

    example: ClassVar[str] = (
        "python tools/view_report.py --report run/report --model run/export --corpus run/corpus"
        " --output report.html"
    )

    report: Path = option("output directory of launch/evaluate.py", by_url=True)
    output: Path = option("HTML file to write")
    corpus: Path | None = option("corpus directory, passages of which are shown", None, by_url=True)
    split: str = option("of the corpus", "test", choices=SPLITS)
    text: tuple[Path, ...] = option("text files to show in place of the corpus's passages", ())
    passages: int = option("passages of the corpus, at even distances", 4, at_least=1)
    tokens: int = option("tokens of a passage, and the most that are shown of a file", 160, at_least=2)
    lmbda: float | None = shared_flags.lmbda("the export's or the gate's, else 0.25")
    dtype: shared_flags.Dtype = shared_flags.dtype("none")
    device: str = shared_flags.device()

    def check(self) -> None:
        super().check()
        if (self.corpus is None) == (not self.text):
            raise UserError("give either --corpus, for passages of it, or --text with files of your own")
        if self.corpus is None:
            self.refuse_unused("split", "passages", of="--corpus")
        if self.gate is not None and self.lmbda is not None:
            raise UserError("--gate finds the weight at each token: leave out --lambda")
        check_output_file(self.output, example="report.html", inputs=self.text)
