"""The flags of `mirror`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.objects.urls import url_of
from mlpmem_ds.stages.shared_flags import MAX_THREADS


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Bring directories of a run to an object store and back: any URL that fsspec opens.

    DIRECTORY URL sends a stage's output, an export, a model or all of a run; URL DIRECTORY fetches it; URL
    --verify reads every object and compares it. Without either: what the cache of inputs from URLs holds.
    """

    example: ClassVar[str] = "python tools/mirror.py run s3://bucket/run --watch"

    source: str | None = option("a local directory, or a URL", None, positional=True, metavar="SOURCE")
    target: str | None = option(
        "where it goes: a URL, or a local directory", None, positional=True, metavar="TARGET"
    )
    watch: bool = option(
        "go on behind running stages: send what they have finished, until it is stopped (of one stage: until"
        " it is complete and there)",
        False,
    )
    watch_seconds: float = option("between two looks of --watch", 10.0, above=0, at_most=86_400)
    verify: bool = option(
        "of a URL alone: read every object and compare its checksum; after sending: the same", False
    )
    replace: bool = option(
        "send all anew where the URL has a whole mirror, or that of another directory; fetch over files of"
        " the same names of another export, checkpoint or model",
        False,
    )
    checkpoints: bool = option(
        "send a training's checkpoints too; fetch those of a finished training too", False
    )
    threads: int = option("files that are sent or fetched at once", 8, at_least=1, at_most=MAX_THREADS)

    def check(self) -> None:
        if not self.watch:
            self.refuse_unused("watch_seconds", of="--watch")
        if self.source is None:
            if self.watch or self.verify or self.replace or self.checkpoints:
                raise UserError(
                    "--watch, --verify, --replace and --checkpoints say how SOURCE is sent, or fetched: give"
                    " that too"
                )
            return
        ways = (self.from_url is not None, self.to_url is not None)
        if self.target is None:
            if self.from_url is None or not self.verify:
                raise UserError(f"{self.source} alone: give DIRECTORY URL, URL DIRECTORY, or URL --verify")
        elif ways[0] == ways[1]:
            kind = "two URLs" if ways[0] else "two local paths"
            raise UserError(
                f"{self.source} and {self.target} are {kind}: give a directory and a URL, such as"
                " s3://bucket/run"
            )
        if self.from_url is not None and self.watch:
            raise UserError("--watch goes with DIRECTORY URL, which sends")
        if self.target is None and (self.checkpoints or self.replace):
            raise UserError(
                "URL --verify reads the checkpoints too, and changes nothing: leave out --checkpoints and"
                " --replace"
            )

    @property
    def from_url(self) -> str | None:
        return None if self.source is None else url_of(self.source)

    @property
    def to_url(self) -> str | None:
        return None if self.target is None else url_of(self.target)
