"""The flags of `fuzz_readers`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.output_files import check_output_file


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Damage files of every kind that is read, and look for what is lost in silence, hangs or crashes.

    Each input is written from its seed, read whole, damaged and read again. A whole file must give what was
    written; a damaged one the same, an error that names the file, or what its bytes hold by an independent
    reading. 2,000 inputs take a few minutes.
    """

    example: ClassVar[str] = "python tools/fuzz_readers.py --seed 1 --count 2000"

    seed: int = option("of the first input; the next ones follow", 0)
    count: int = option("inputs to try", 2000, at_least=1)
    reader: tuple[str, ...] | None = option("kinds of files, by name (default: all)", None, metavar="NAME")
    keep: Path | None = option("directory in which the files of failures are kept", None)
    output: Path | None = option("JSON file for the counts and the failures", None)
    max_seconds: float = option("of an input, after which it counts as hung", 20.0, above=0, at_most=86400)
    max_bytes: float = option(
        "memory that a reader may ask for in addition to its start's", 4e9, above=0, at_most=1e15
    )

    def check(self) -> None:
        if self.output is not None:
            check_output_file(self.output, example="fuzz.json")
