"""The run book: its commands are run, and its messages are messages of the source."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.commands import inspect_run
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.files import sha256_of_file
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.inspection import watch

from .test_docs import code_of, text_of, texts_of_source

PAGE = "docs/OPERATIONS.md"
OF_THE_SYSTEM = ("No space left", "Disk quota exceeded")
MAX_WORDS = 1700
"""three pages"""


def inspections() -> list[list[str]]:
    """The flags of every inspect_run of the page's blocks."""
    lines = [line for line in code_of(text_of(PAGE)) if line.startswith("python tools/inspect_run.py ")]
    return [shlex.split(line.partition(" >")[0])[2:] for line in lines]


def rows() -> list[list[str]]:
    section = text_of(PAGE).partition("## What goes wrong\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    output: Path = option("directory")


def make(root: Path, unit: str, **inputs: str) -> None:
    stage = open_stage(root, stage="toy", version=1, config=Config(output=root), inputs=inputs, world=World())
    stage.run_units([unit, "1"], lambda unit, writer: writer.array(f"{unit}.npy", np.ones(9)))
    stage.complete([unit, "1"], lambda: {})


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory with the page's names."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    make(run / "keys", "000000000000")
    make(run / "targets", "knn-000000000000", keys=sha256_of_file(run / "keys" / "manifest.json"))
    return run


def test_every_inspection_of_the_page_runs(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)  # Ctrl-C in the first pause
    flags = inspections()
    assert [inspect_run(words) for words in flags] == [0] * len(flags)
    assert {word for words in flags for word in words if word.startswith("--")} == {
        "--watch",
        "--prometheus",
        "--no-checksums",
        "--output",
        "--discard",
        "--yes",
        "--keep-dependents",
    }
    assert not (run_dir / "targets" / "knn-000000000000.npy").exists()  # what --yes does
    assert (run_dir / "targets" / "1.npy").exists() and not (run_dir / "keys" / "000000000000.npy").exists()


def test_its_messages_are_messages_of_the_source() -> None:
    assert len(rows()) >= 15
    for message, meaning, remedy in rows():
        assert meaning and remedy
        for text in re.findall(r"`([^`]*)`", message):
            for piece in re.split(r"\s*…\s*", text):
                is_of_source = len(piece) < 4 or piece in texts_of_source()
                assert is_of_source or piece in OF_THE_SYSTEM, f"{piece!r} is no piece of a message"


def test_it_is_short() -> None:
    assert len(text_of(PAGE).split()) <= MAX_WORDS
