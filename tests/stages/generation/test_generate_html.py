"""`generate --html`: the page takes nothing from the text and its log."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlpmem_ds.stages.generation import generate as generate_module

from .conftest import run_front_end


def test_the_page_is_not_counted(
    export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model", export_dir, "--prompt", "alpha", "--max-new-tokens", 3, "--base-only-threshold", 0.9)
    counts = []
    for more in ([], ["--html", tmp_path / "page.html"]):
        assert run_front_end(*flags, *more) == 0
        [line] = [
            line for line in capsys.readouterr().err.splitlines() if "the memory was left out at" in line
        ]
        counts.append(line.partition("the memory")[2])
    assert counts[0] == counts[1] and (tmp_path / "page.html").is_file()


@pytest.mark.parametrize("way", [[], ["--stream"], ["--compare"]])
def test_a_page_that_cannot_be_written_takes_no_text(
    way: list[str],
    export_dir: Path,
    tmp_path: Path,
    generate: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--prompt", "alpha beta", "--max-new-tokens", 4, *way]
    text = generate(*flags)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "page.html"))

    monkeypatch.setattr(generate_module, "write_generated", refuse)
    assert run_front_end("--model", export_dir, *flags, "--html", tmp_path / "page.html") == 2
    captured = capsys.readouterr()
    assert captured.out == text and "page.html" in captured.err
