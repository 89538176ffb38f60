"""Records as the data sets of the Hub have them → the fields that the tasks read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlpmem_ds.stages.harness import hub_records


class Rows:
    """As much of a data set as is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.column_names = rows, list(rows[0])

    def map(
        self, convert: Callable[[Any], Any], remove_columns: list[str], batched: bool = False
    ) -> list[Any]:
        assert remove_columns == self.column_names
        if not batched:
            return [convert(row) for row in self.rows]
        found = convert({name: [row[name] for row in self.rows] for name in self.column_names})
        return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]


@pytest.mark.parametrize(
    ("name", "row", "record"),
    [
        ("open_question", {"question": "q", "answer": "a"}, {"question": "q", "answer": ["a"]}),
        ("web_question", {"question": "q", "answers": ["a", "b"]}, {"question": "q", "answer": ["a", "b"]}),
        (
            "trivia_question",
            {"question": "q", "answer": {"aliases": ["a"]}},
            {"question": "q", "answer": ["a"]},
        ),
        ("golden_question", {"question": "q", "golden_answers": ["a"]}, {"question": "q", "answer": ["a"]}),
        ("pop_question", {"question": "q", "possible_answers": '["a"]'}, {"question": "q", "answer": ["a"]}),
        (
            "piqa",
            {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
            {"query": "g", "choices": ["a", "b"], "gold": 1},
        ),
        (
            "arc",
            {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
            {"query": "q", "choices": ["a", "b"], "gold": 1},
        ),
        (
            "mmlu",
            {"question": "q ", "choices": ["x", "y"], "answer": 1},
            {"query": "q\nA. x\nB. y\nAnswer:", "choices": ["A", "B"], "gold": 1},
        ),
        (
            "boolq",
            {"question": "q", "passage": "p", "label": 0},
            {"question": "q", "passage": "p", "answer": False},
        ),
        ("sst2", {"sentence": "fine ", "label": 1}, {"text": "fine", "label": 1}),
        (
            "rte",
            {"sentence1": "p", "sentence2": "h", "label": 0},
            {"premise": "p", "hypothesis": "h", "label": 0},
        ),
        (
            "yahoo",
            {"question_title": "t", "question_content": "c", "best_answer": "b", "topic": 9},
            {"text": "title: t content: c answer: b", "label": 9},
        ),
    ],
)
def test_a_record(name: str, row: dict[str, Any], record: dict[str, Any]) -> None:
    assert getattr(hub_records, name)(Rows([row])) == [record]


def test_the_right_answer_of_a_shuffled_record_is_followed() -> None:
    row = {"Question": "q", "Correct Answer": "right", **{f"Incorrect Answer {n}": f"{n}" for n in (1, 2, 3)}}
    [record] = hub_records.gpqa(Rows([row]))
    assert f"{'ABCD'[record['gold']]}. right" in record["query"]
    [record] = hub_records.sciq(
        Rows(
            [
                {
                    "support": " s",
                    "question": "q",
                    "correct_answer": "r",
                    **{f"distractor{number}": f"{number}" for number in (1, 2, 3)},
                }
            ]
        )
    )
    assert record["choices"][record["gold"]] == "r" and record["query"] == "s\nQuestion: q\nAnswer:"


def test_each_answer_of_halueval_is_judged() -> None:
    rows = [{"knowledge": "k", "question": "q", "right_answer": "r", "hallucinated_answer": "h"}]
    true, false = hub_records.halueval_qa(Rows(rows))
    assert true["gold"] == 1 and false["gold"] == 0 and true["choices"] == ["Yes", "No"]
    assert true["group"] == false["group"] == "Knowledge: k\nQuestion: q"
    assert "Answer: r\n" in true["query"] and "Answer: h\n" in false["query"]
    assert true["query"].startswith("Knowledge: k\nQuestion: q\n")
    [first, _] = hub_records.halueval_summarization(
        Rows([{"document": "d", "right_summary": "r", "hallucinated_summary": "h"}])
    )
    assert first["query"].startswith("Document: d\nSummary: r\n")


def test_truthful_answers_are_marked_by_both_lists() -> None:
    targets = {
        "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["a", "c", "b"], "labels": [1, 1, 0]},
    }
    [record] = hub_records.truthful_question(Rows([{"question": "q", **targets}]))
    assert record == {
        "question": "q",
        "choices": ["a", "b", "c"],
        "gold": 0,
        "mc1": [1, 0, -1],
        "mc2": [1, 0, 1],
    }


def test_winogrande_asks_for_the_same_end() -> None:
    doc = {"sentence": "The _ is red.", "option1": "car", "option2": "sky", "answer": "2"}
    assert hub_records.winogrande_beginnings(doc) == ["The car", "The sky"]
    assert hub_records.winogrande_end(doc) == "is red." and hub_records.winogrande_gold(doc) == 1
