"""`view_report` and `generate --html`: from flags to a file, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from mlpmem_ds.commands import generate, view_report
from mlpmem_ds.core.files import publish_json

from ...conftest import with_begin_tokens, with_vocabulary
from ..conftest import make_arm, make_evaluation, save_report


@pytest.fixture
def report_dir(tmp_path: Path) -> Path:
    return _report(tmp_path / "report")


def _report(root: Path, **inputs: str) -> Path:
    arms = (make_arm("base", ppl=20.0), make_arm("base+memory", ppl=16.0))
    return save_report(root, make_evaluation(*arms, subject="base+memory"), inputs=inputs)


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
        (("--text", "a", "--split", "tuning"), "--split is of --corpus: add that, or leave it out"),
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


def test_texts_are_read_by_their_marks(
    report_dir: Path, export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte-order mark is no text; what has none is UTF-8, and its line ends are those of the corpus."""
    pages = []
    for content in (b"alpha\nbeta", b"\xef\xbb\xbfalpha\r\nbeta", "alpha\nbeta".encode("utf-16")):
        (tmp_path / "own.txt").write_bytes(content)
        assert _run(report_dir, export_dir, tmp_path / "page.html", "--text", tmp_path / "own.txt") == 0
        pages.append((tmp_path / "page.html").read_bytes())
    assert pages[0] == pages[1] == pages[2]
    (tmp_path / "own.txt").write_bytes("café".encode("latin-1"))
    assert _run(report_dir, export_dir, tmp_path / "page.html", "--text", tmp_path / "own.txt") == 2
    assert "own.txt: it is not UTF-8" in capsys.readouterr().err


def test_the_text_that_is_read_is_not_replaced(
    report_dir: Path, export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.txt").write_text("alpha beta")
    assert _run(report_dir, export_dir, tmp_path / "own.txt", "--text", tmp_path / "own.txt") == 2
    assert "is also what is read, and would be replaced" in capsys.readouterr().err
    flags = ["--model", "m", "--prompts-file", tmp_path / "own.txt", "--html", tmp_path / "own.txt"]
    assert generate([str(word) for word in flags], prog="generate") == 2
    assert "--html" in capsys.readouterr().err and (tmp_path / "own.txt").read_text() == "alpha beta"


def test_a_corpus_of_another_vocabulary_and_a_report_of_another_base_are_refused(
    export_dir: Path, corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, text = tmp_path / "page.html", tmp_path / "own.txt"
    text.write_text("alpha beta")
    other = with_vocabulary(corpus_dir, tmp_path / "other", "5" * 64)
    report = _report(tmp_path / "report", model="a" * 64)
    assert _run(report, export_dir, page, "--corpus", other) == 2
    assert f"{other} has another vocabulary (300 tokens, 555555555555…)" in capsys.readouterr().err
    assert _run(report, export_dir, page, "--text", text) == 0  # the export says nothing of its base
    export = shutil.copytree(export_dir, tmp_path / "export")
    publish_json(export / "mlpmem_export.json", {"inputs": {"base": "b" * 64}, "files": []}, seal=True)
    assert _run(report, export, page, "--text", text) == 2
    assert "is of the base run/base (aaaaaaaaaaaa…), and --model" in capsys.readouterr().err
    assert _run(tmp_path / "corpus", export, page, "--text", text) == 2
    assert f"--report {tmp_path / 'corpus'} does not exist: give the output of evaluate" in (
        capsys.readouterr().err
    )


def test_more_tokens_than_the_model_reads_are_said(
    report_dir: Path, export_dir: Path, corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = with_begin_tokens(corpus_dir, tmp_path / "begun", (1, 2, 3))
    flags = ("--corpus", begun, "--passages", 1, "--tokens", 100)
    assert _run(report_dir, export_dir, tmp_path / "page.html", *flags) == 0
    assert "--tokens 100 are more than the model reads: 61 are shown" in capsys.readouterr().err
    assert _tokens((tmp_path / "page.html").read_text(encoding="utf-8")) == 61


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
