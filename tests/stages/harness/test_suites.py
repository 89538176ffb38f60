"""The tasks of a suite with records of local files."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlpmem_ds.stages.harness.suites import open_suites

from ...lm_harness import needs_harness
from ..conftest import write_lines


@needs_harness
@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("nq_open", "Question: who is it?\nAnswer:"),
        ("triviaqa", "Question: Who is it? The answer is:"),
        ("boolq", "Question: Who is it?\nAnswer:"),
    ],
)
@pytest.mark.parametrize("question", ["Who is it", "Who is it?", "Who is it? ", "Who is it "])
def test_a_question_has_one_mark(name: str, end: str, question: str, tmp_path: Path) -> None:
    answer = True if name == "boolq" else "x"
    write_lines(tmp_path / f"{name}.jsonl", [{"question": question, "answer": answer}])
    [task] = open_suites(("paper",), tmp_path).tasks
    assert task.documents()[0].prompt.endswith(end)
