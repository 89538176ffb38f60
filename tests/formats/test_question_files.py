"""Question files: each layout becomes the same kind of record; what is wrong is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.question_files import Question, read_questions


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


LAYOUTS = {
    "open": (
        {"question": "who is it?", "answer": ["a", "b"]},
        Question(kind="open", prompt="Q: who is it?\nA:", answers=("a", "b")),
    ),
    "one answer": (
        {"question": "who", "answer": "a"},
        Question(kind="open", prompt="Q: who?\nA:", answers=("a",)),
    ),
    "blanks behind the mark": (
        {"question": "who is it?? ", "answer": "a"},
        Question(kind="open", prompt="Q: who is it?\nA:", answers=("a",)),
    ),
    "truth": (
        {"question": "is it? ", "answer": False, "passage": "It is not."},
        Question(
            kind="choice", prompt="It is not.\nQuestion: is it?\nAnswer:", answers=("yes", "no"), gold=1
        ),
    ),
    "targets": (
        {"question": "why?", "mc1_targets": {"x": 0, "y": 1}, "mc2_targets": {}},
        Question(kind="choice", prompt="Q: why?\nA:", answers=("x", "y"), gold=1),
    ),
    "choices": (
        {"query": "do", "choices": ["x", "y"], "gold": 0},
        Question(kind="choice", prompt="do", answers=("x", "y"), gold=0),
    ),
    "grouped choices": (
        {"query": "do", "choices": ["x", "y"], "gold": 1, "group": "one"},
        Question(kind="choice", prompt="do", answers=("x", "y"), gold=1, group="one"),
    ),
    "label": (
        {"text": "fine", "label": 1, "labels": ["bad", "good"]},
        Question(kind="choice", prompt="fine\nLabel:", answers=("bad", "good"), gold=1),
    ),
    "pair": (
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "not_entailment"},
        Question(
            kind="choice",
            prompt="It rains.\nQuestion: It is wet. true or false?\nAnswer:",
            answers=("true", "false"),
            gold=1,
        ),
    ),
    "pair of three": (
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "neutral"},
        Question(
            kind="choice",
            prompt="It rains.\nQuestion: It is wet. true, false, or neither?\nAnswer:",
            answers=("true", "false", "neither"),
            gold=2,
        ),
    ),
    "last word": (
        {"text": "so it goes  on "},
        Question(kind="last word", prompt="so it goes", answers=("on",)),
    ),
}


@pytest.mark.parametrize("record, question", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_is_known_by_its_fields(tmp_path: Path, record: Any, question: Question) -> None:
    path = write(tmp_path / "x.jsonl", record, record, record)
    assert read_questions(path) == [question] * 3
    assert read_questions(path, limit=2) == [question] * 2


@pytest.mark.parametrize(
    "records, said",
    [
        ([], "is empty"),
        (
            [{"premises": "x"}],
            r"its first record has the fields premises; known are: query, choices, gold;",
        ),
        ([3], "its first record has the fields int"),
        ([{"question": "a", "answer": "b"}, {"question": "a"}], "line 2 has no text or list in `answer`"),
        ([{"question": "a", "mc1_targets": {"x": 1, "y": 1}}], "of which one has 1"),
        ([{"question": "a", "mc1_targets": {"x": 1, "y": 2}}], "and the others 0"),
        ([{"question": "a", "mc1_targets": {"x": 1, "\ud800": 0}}], "has half of a surrogate pair"),
        *(
            ([{"question": "a", "mc1_targets": {"x": 1, "y": 0}, "mc2_targets": targets}], "`mc2_targets`")
            for targets in (["x"], [], {"x": 0}, {"x": "1"}, {" ": 1})
        ),
        ([{"query": "a", "choices": ["x", "y"], "gold": 0, "group": 3}], "has no text in `group`"),
        ([{"text": "a", "label": 2, "labels": ["x", "y"]}], "has 2 in `label`"),
        ([{"premise": "a", "hypothesis": "b", "label": "no"}], "has none of entailment, not_entailment"),
        ([{"premise": "a", "hypothesis": "b", "label": ["no"]}], "has none of entailment, not_entailment"),
        ([{"premise": "a", "hypothesis": 3, "label": "no"}], "has no text in `hypothesis`"),
        (
            [
                {"premise": "a", "hypothesis": "b", "label": label}
                for label in ("not_entailment", "contradiction")
            ],
            r"^--questions .*x\.jsonl: .* has not_entailment and contradiction: give them as two files",
        ),
        ([{"text": "word"}], "no text of two or more words"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, records: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_questions(write(tmp_path / "x.jsonl", *records))


@pytest.mark.shared_data
def test_the_shared_sets_are_read() -> None:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "qa"
    if not folder.is_dir():
        pytest.skip("the shared question sets are absent")
    kinds = {path.name.partition(".")[0]: read_questions(path)[0].kind for path in folder.glob("*.jsonl")}
    assert kinds["nq_open"] == "open" and kinds["lambada"] == "last word" and kinds["boolq"] == "choice"
    assert len(kinds) >= 20


def test_a_file_of_two_labels_has_two_verdicts_in_every_record(tmp_path: Path) -> None:
    pairs = [
        {"premise": "a", "hypothesis": "b", "label": label} for label in ("entailment", "not_entailment")
    ]
    found = read_questions(write(tmp_path / "x.jsonl", *pairs))
    assert [question.answers for question in found] == [("true", "false")] * 2
    assert [question.gold for question in found] == [0, 1]
