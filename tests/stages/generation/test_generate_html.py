"""`generate --html`: the page takes nothing from the text and its log."""

from __future__ import annotations

from pathlib import Path

import pytest

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
