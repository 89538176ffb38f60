"""`view_report` and `generate --html`: from flags to a file, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlpmem_ds.commands import generate, view_report
from mlpmem_ds.formats.evaluation import write_evaluation

from ..conftest import make_arm, make_evaluation


@pytest.fixture
def report_dir(tmp_path: Path) -> Path:
    root = tmp_path / "report"
    root.mkdir()
    arms = (make_arm("base", ppl=20.0), make_arm("base+memory", ppl=16.0))
    write_evaluation(root, make_evaluation(*arms, subject="base+memory"))
    return root


def _run(report: Path, export: Path, output: Path, *words: object) -> int:
    flags = ("--report", report, "--model", export, "--output", output, *words)
    return view_report([str(word) for word in flags], prog="view_report")


def _tokens(page: str) -> int:
    return len(re.findall(r'data-at="', page))


def test_passages_of_a_corpus_and_texts_of_ones_own(
    report_dir: Path, export_dir: Path, corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    flags = ("--corpus", corpus_dir, "--passages", 2, "--tokens", 12)
    assert _run(report_dir, export_dir, output, *flags) == 0
    page = output.read_text(encoding="utf-8")
    assert page.count("<section>") == 2 and 22 <= _tokens(page) <= 24
    text = tmp_path / "own.txt"
    text.write_text("alpha beta return", encoding="utf-8")
    assert (
        _run(report_dir, export_dir, output, "--text", text, "--lambda", 1, "--base-only-threshold", 1) == 0
    )
    assert capsys.readouterr().err.count("--base-only-threshold 1 is for a gate (--gate)") == 1
    own = output.read_text(encoding="utf-8")
    assert "<h3>own.txt</h3>" in own and own != page


@pytest.mark.parametrize(
    "words, said",
    [
        ((), "give either --corpus"),
        (("--text", "absent.txt"), "--text absent.txt cannot be read"),
        (("--text", "a", "--corpus", "b"), "give either --corpus"),
    ],
)
def test_wrong_flags_are_refused(
    report_dir: Path,
    export_dir: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run(report_dir, export_dir, tmp_path / "page.html", *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "page.html").exists()


def test_an_output_that_is_a_folder_or_in_none_and_a_text_of_nothing_are_refused(
    report_dir: Path, export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "empty.txt"
    text.touch()
    for output, own, said in (
        (tmp_path, text, "is a directory"),
        (tmp_path / "no" / "page.html", text, "does not exist"),
        (tmp_path / "page.html", text, "there is nothing to predict"),
    ):
        assert _run(report_dir, export_dir, output, "--text", own) == 2
        assert said in capsys.readouterr().err


def test_generated_text_is_a_page_too(
    export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "generated.html"
    flags = ("--model", export_dir, "--prompt", "alpha beta", "--max-new-tokens", 5, "--html", output)
    assert generate([str(word) for word in flags], prog="generate") == 0
    page = output.read_text(encoding="utf-8")
    assert 'class="given"' in page and 1 <= _tokens(page) <= 5
    assert generate(["--model", "m", "--prompt", "a", "--html", str(tmp_path)], prog="generate") == 2
    assert "--html" in capsys.readouterr().err
