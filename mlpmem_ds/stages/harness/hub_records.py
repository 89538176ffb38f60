"""Part of `run_lm_eval`: data sets of the Hub → the fields that the tasks of `tasks/` read, those of local
files.

The YAML files name these functions. Each takes a data set of Hugging Face `datasets` (its `map` alone is
used) and returns one; a record's number stays the same, but for HaluEval: each of its records is asked twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
_LETTERS = "ABCDEFGHIJ"


def open_question(data: Any) -> Any:
    """`question`, `answer`: a text or a list."""
    return _each(data, lambda row: _open(row["question"], row["answer"]))


def web_question(data: Any) -> Any:
    return _each(data, lambda row: _open(row["question"], row["answers"]))


def trivia_question(data: Any) -> Any:
    return _each(data, lambda row: _open(row["question"], row["answer"]["aliases"]))


def golden_question(data: Any) -> Any:
    return _each(data, lambda row: _open(row["question"], row["golden_answers"]))


def pop_question(data: Any) -> Any:
    return _each(data, lambda row: _open(row["question"], json.loads(row["possible_answers"])))


def truthful_question(data: Any) -> Any:
    """Two lists of answers → one, with a mark of each list on each answer."""

    def convert(row: Record) -> dict[str, Any]:
        first, second = (
            dict(zip(row[name]["choices"], row[name]["labels"], strict=True))
            for name in ("mc1_targets", "mc2_targets")
        )
        return truthful_record(row["question"], first, second)

    return _each(data, convert)


def truthful_record(question: str, first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, Any]:
    """The record of `truthful`: each answer once, marked 1, 0, or -1 for one that is not in the list."""
    answers = list(dict.fromkeys([*first, *second]))
    return {
        "question": question,
        "choices": answers,
        "gold": answers.index(next(text for text, mark in first.items() if mark == 1)),
        "mc1": [first.get(text, -1) for text in answers],
        "mc2": [second.get(text, -1) for text in answers],
    }


def piqa(data: Any) -> Any:
    return _each(data, lambda row: _choice(row["goal"], [row["sol1"], row["sol2"]], row["label"]))


def arc(data: Any) -> Any:
    return _each(
        data,
        lambda row: _choice(
            row["question"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
        ),
    )


def sciq(data: Any) -> Any:
    """The right answer is the last of the choices."""

    def convert(row: Record) -> dict[str, Any]:
        query = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
        false = [row[f"distractor{number}"] for number in (1, 2, 3)]
        return _choice(query, [*false, row["correct_answer"]], 3)

    return _each(data, convert)


def logiqa(data: Any) -> Any:
    def convert(row: Record) -> dict[str, Any]:
        query = (
            f"Passage: {row['context']}\nQuestion: {row['question']}\nChoices:\n"
            f"{_lettered(row['options'])}\nAnswer:"
        )
        return _choice(query, row["options"], "abcd".index(row["label"].strip()))

    return _each(data, convert)


def mmlu(data: Any) -> Any:
    def convert(row: Record) -> dict[str, Any]:
        query = f"{row['question'].strip()}\n{_lettered(row['choices'])}\nAnswer:"
        return _choice(query, list(_LETTERS[: len(row["choices"])]), row["answer"])

    return _each(data, convert)


def gpqa(data: Any) -> Any:
    """The choices stand in the order of a hash, so that the right one has no place of its own."""

    def convert(row: Record) -> dict[str, Any]:
        right = row["Correct Answer"].strip()
        false = [row[f"Incorrect Answer {number}"].strip() for number in (1, 2, 3)]
        answers = sorted([right, *false], key=lambda text: hashlib.sha256(text.encode()).digest())
        query = (
            f"What is the correct answer to this question: {row['Question']}\nChoices:\n"
            f"{_lettered(answers)}\nAnswer:"
        )
        return _choice(query, list("ABCD"), answers.index(right))

    return _each(data, convert)


def boolq(data: Any) -> Any:
    return _each(
        data,
        lambda row: {
            "question": row["question"], "passage": row["passage"], "answer": bool(row["label"]),
        },
    )  # fmt: skip


def strategy_question(data: Any) -> Any:
    return _each(data, lambda row: {"question": row["question"], "answer": bool(row["answer"])})


def sst2(data: Any) -> Any:
    return _each(data, lambda row: {"text": row["sentence"].strip(), "label": row["label"]})


def labelled(data: Any) -> Any:
    return _each(data, lambda row: {"text": row["text"].strip(), "label": int(row["label"])})


def yahoo(data: Any) -> Any:
    def convert(row: Record) -> dict[str, Any]:
        title, content, answer = (row[name] for name in ("question_title", "question_content", "best_answer"))
        return {"text": f"title: {title} content: {content} answer: {answer}", "label": row["topic"]}

    return _each(data, convert)


def cb(data: Any) -> Any:
    """Its labels are 0 entailment, 1 contradiction, 2 neutral, as the task's choices."""
    return _each(data, lambda row: {name: row[name] for name in ("premise", "hypothesis", "label")})


def rte(data: Any) -> Any:
    return _each(
        data,
        lambda row: {
            "premise": row["sentence1"], "hypothesis": row["sentence2"], "label": row["label"],
        },
    )  # fmt: skip


def halueval_dialogue(data: Any) -> Any:
    return _judged(data, "dialogue_history", "right_response", "hallucinated_response", "response")


def halueval_qa(data: Any) -> Any:
    return _judged(data, "question", "right_answer", "hallucinated_answer", "answer")


def halueval_summarization(data: Any) -> Any:
    return _judged(data, "document", "right_summary", "hallucinated_summary", "summary")


def winogrande_gold(doc: Record) -> int:
    """Which of the two beginnings is right: the harness scores the same end after both."""
    return int(doc["answer"]) - 1


def winogrande_beginnings(doc: Record) -> list[str]:
    before = doc["sentence"].partition("_")[0]
    return [before + doc[name] for name in ("option1", "option2")]


def winogrande_end(doc: Record) -> str:
    return str(doc["sentence"].partition("_")[2].strip())


def _each(data: Any, convert: Callable[[Record], dict[str, Any]]) -> Any:
    return data.map(convert, remove_columns=data.column_names)


def _judged(data: Any, given: str, right: str, false: str, noun: str) -> Any:
    """HaluEval: both answers of a record, each with the question whether it is made up; they are a group."""

    def convert(batch: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
        knowledge = batch.get("knowledge") or [""] * len(batch[given])
        rows = []
        for facts, text, *answers in zip(knowledge, batch[given], batch[right], batch[false], strict=True):
            told = f"Knowledge: {facts}\n" if facts else ""
            group = f"{told}{given.replace('_', ' ').capitalize()}: {text}"
            for answer, gold in zip(answers, (1, 0), strict=True):
                query = (
                    f"{group}\n{noun.capitalize()}: {answer}\nDoes the {noun} contain made-up information?"
                    " Answer Yes or No:"
                )
                rows.append({**_choice(query, ["Yes", "No"], gold), "group": group})
        return {name: [row[name] for row in rows] for name in rows[0]}

    return data.map(convert, batched=True, remove_columns=data.column_names)


def _open(question: str, answer: str | Sequence[str]) -> dict[str, Any]:
    return {"question": question, "answer": [answer] if isinstance(answer, str) else list(answer)}


def _choice(query: str, choices: Sequence[str], gold: int) -> dict[str, Any]:
    return {"query": query, "choices": list(choices), "gold": gold}


def _lettered(choices: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, choices, strict=False))
