"""Questions in local files of JSON lines, of several layouts → one kind of record, checked by line.

    question, answer: text or list of texts        open: any of the texts is right
    question, answer: true or false (, passage)    choice between yes and no
    question, mc1_targets: {text: 0 or 1}          choice: the one text with 1 is right (TruthfulQA)
    query, choices, gold (, group)                 choice; records of a group are about one question
    text, label, labels                            choice of the label's name
    premise, hypothesis, label                     choice: true, false (, neither); of entailment
    text                                           last word: the text's last word is right (LAMBADA)

`answer_questions` and the suites of `run_lm_eval` read all of them, `run_lm_eval` without a suite two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.json_lines import RepeatedNames, json_records

Kind = Literal["open", "choice", "last word"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question as it is asked: `prompt` is what a model goes on with.

    `answers`: the accepted ones of an open question, the choices in their order, or the last word alone.
    """

    kind: Kind
    prompt: str
    answers: tuple[str, ...]
    gold: int = 0
    """index of the right choice"""
    group: str | None = None
    """what questions about one thing have in common, if the file says it"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the records of a file are read."""

    fields: tuple[str, ...]
    """without which a record is not of this layout"""
    fault_of: Callable[[Any], str | None]
    questions: Callable[[Sequence[dict[str, Any]]], list[Question]]
    """of all records of a file"""
    optional: tuple[str, ...] = ()


def read_questions(path: Path, *, flag: str = "--questions", limit: int | None = None) -> list[Question]:
    """The questions of a file, in its order; at most `limit`. The first record says the layout of all.

    Raises:
        UserError: the file cannot be read, its layout is none of these, or a record has a fault.
    """
    records = _records(path, flag)
    if not records:
        raise UserError(f"{flag} {path} is empty: write one JSON object a line")
    first = records[0][1]
    layout = next(
        (each for each in LAYOUTS if isinstance(first, dict) and set(each.fields) <= set(first)), None
    )
    if layout is None:
        named = ", ".join(sorted(first)) if isinstance(first, dict) else type(first).__name__
        layouts = "; ".join(", ".join(each.fields) for each in LAYOUTS)
        raise UserError(f"{flag} {path}: its first record has the fields {named}; known are: {layouts}")
    found = read_records(path, flag, layout.fields, layout.fault_of, optional=layout.optional)
    try:
        return layout.questions(found)[:limit]
    except UserError as error:
        raise UserError(f"{flag} {path}: {error}") from error


def _each(
    question: Callable[[dict[str, Any]], Question],
) -> Callable[[Sequence[dict[str, Any]]], list[Question]]:
    """A layout in which each record is a question of its own."""
    return lambda records: [question(record) for record in records]


ABOVE_OPEN_QUESTIONS = "Answer these questions:\n\n"
"""stands before open questions, as in NQ-open's task of the lm-evaluation-harness"""


def open_prompt(record: Mapping[str, Any]) -> str:
    """How an open question is asked, as NQ-open's task of the lm-evaluation-harness asks it: that puts a mark
    behind its questions, which have none; so one that has its own is asked with one too."""
    return f"Q: {_with_one_mark(record['question'])}\nA:"


def _of_answers(record: dict[str, Any]) -> Question:
    answers = tuple(as_list(record["answer"]))
    return Question(kind="open", prompt=open_prompt(record), answers=answers)


def yes_no_prompt(record: Mapping[str, Any]) -> str:
    """How a question of truth is asked, behind its passage if it has one; the suites' tasks BoolQ and
    StrategyQA name this function."""
    passage = f"{record['passage']}\n" if record.get("passage") else ""
    return f"{passage}Question: {_with_one_mark(record['question'])}\nAnswer:"


def _with_one_mark(question: str) -> str:
    return f"{question.rstrip().rstrip('?')}?"


def _of_truth(record: dict[str, Any]) -> Question:
    return Question(
        kind="choice",
        prompt=yes_no_prompt(record),
        answers=("yes", "no"),
        gold=0 if record["answer"] else 1,
    )


def _of_answer(record: dict[str, Any]) -> Question:
    return _of_truth(record) if isinstance(record["answer"], bool) else _of_answers(record)


def _of_targets(record: dict[str, Any]) -> Question:
    targets = record["mc1_targets"]
    return Question(
        kind="choice",
        prompt=open_prompt(record),
        answers=tuple(targets),
        gold=list(targets.values()).index(1),
    )


def _of_choices(record: dict[str, Any]) -> Question:
    return Question(
        kind="choice",
        prompt=record["query"],
        answers=tuple(record["choices"]),
        gold=record["gold"],
        group=record.get("group"),
    )


def _of_label(record: dict[str, Any]) -> Question:
    return Question(
        kind="choice",
        prompt=f"{record['text']}\nLabel:",
        answers=tuple(record["labels"]),
        gold=record["label"],
    )


def _of_pairs(records: Sequence[dict[str, Any]]) -> list[Question]:
    """A file whose labels are entailment and not_entailment has two verdicts, any other three."""
    labels = _TWO_LABELS if any(record["label"] == _TWO_LABELS[1] for record in records) else _THREE_LABELS
    if others := sorted({record["label"] for record in records} - {*labels}):
        raise UserError(
            f"the labels of a file are {', '.join(_TWO_LABELS)}, or {', '.join(_THREE_LABELS)}; this one has"
            f" {_TWO_LABELS[1]} and {', '.join(others)}: give them as two files"
        )
    asked = "true or false" if labels == _TWO_LABELS else "true, false, or neither"
    return [
        Question(
            kind="choice",
            prompt=f"{record['premise']}\nQuestion: {record['hypothesis']} {asked}?\nAnswer:",
            answers=_VERDICTS[: len(labels)],
            gold=labels.index(record["label"]),
        )
        for record in records
    ]


def _of_last_word(record: dict[str, Any]) -> Question:
    before, word = record["text"].rstrip().rsplit(maxsplit=1)
    return Question(kind="last word", prompt=before, answers=(word,))


def _fault_of_answer(record: Any) -> str | None:
    is_truth = isinstance(record, dict) and isinstance(record.get("answer"), bool)
    return fault_of_question({**record, "answer": "yes"} if is_truth else record)


def _fault_of_choices(record: Any) -> str | None:
    if (fault := fault_of_ranking(record)) is not None:
        return fault
    return None if "group" not in record or _is_text(record["group"]) else "has no text in `group`"


def _fault_of_targets(record: Any) -> str | None:
    if not isinstance(record, dict) or not _is_text(record.get("question")):
        return "has no text in `question`"
    marks = _marks_of(record.get("mc1_targets"))
    if marks is None or len(marks) < 2 or marks.count(1) != 1:
        return "has no texts in `mc1_targets` of which one has 1 and the others 0"
    if record.get("mc2_targets") in (None, {}):
        return None  # those of `mc1_targets` are taken
    marks = _marks_of(record["mc2_targets"])
    return None if marks and 1 in marks else "has no texts in `mc2_targets` with 1 or 0, at least one with 1"


def _marks_of(targets: Any) -> list[int] | None:
    """Of {text: 0 or 1} the numbers; None: it is something else."""
    if not isinstance(targets, dict) or not all(map(_is_text, targets)):
        return None
    marks = list(targets.values())
    return marks if all(type(mark) is int and mark in (0, 1) for mark in marks) else None


def _fault_of_pair(record: Any) -> str | None:
    for name in ("premise", "hypothesis"):
        if not isinstance(record, dict) or not _is_text(record.get(name)):
            return f"has no text in `{name}`"
    accepted = list(dict.fromkeys((*_TWO_LABELS, *_THREE_LABELS)))  # a label may be of any type
    return None if record.get("label") in accepted else f"has none of {', '.join(accepted)} in `label`"


def _fault_of_label(record: Any) -> str | None:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):  # a review may be blank
        return "has no text in `text`"
    values = {"query": "", "choices": record.get("labels"), "gold": record.get("label")}
    fault = fault_of_ranking(values)
    return None if fault is None else fault.replace("`choices`", "`labels`").replace("`gold`", "`label`")


def _fault_of_last_word(record: Any) -> str | None:
    text = record.get("text") if isinstance(record, dict) else None
    is_text = isinstance(text, str) and len(text.split()) > 1
    return None if is_text else "has no text of two or more words in `text`"


def read_layout(path: Path, fields: Sequence[str], *, flag: str) -> list[dict[str, Any]]:
    """The records of a file of the layout that has these fields.

    Raises:
        UserError: as `read_records`.
    """
    layout = next(each for each in LAYOUTS if set(each.fields) == set(fields))
    return read_records(path, flag, layout.fields, layout.fault_of, optional=layout.optional)


def read_records(
    path: Path,
    flag: str,
    names: Sequence[str],
    fault_of: Callable[[Any], str | None],
    *,
    optional: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, with these fields alone.

    Args:
        path: the file.
        flag: that named it.
        names: of the fields.
        fault_of: what is wrong with a record, in words; None: nothing.
        optional: further fields, of the records that have them.

    Raises:
        UserError: the file cannot be read, is empty, or has a record with a fault; with its place.
    """
    records = []
    for place, record in _records(path, flag):
        fault, found = fault_of(record), dict[str, Any]()
        if fault is None:
            found = {name: record[name] for name in (*names, *optional) if name in record}
            fault = _fault_of_fields(record, list(found))
        if fault is not None:
            raise UserError(
                f"{flag} {path}, {place} {fault}: a record of this file has the fields {', '.join(names)}"
                " (docs/questions.md)"
            )
        records.append(found)
    if not records:
        raise UserError(f"{flag} {path} is empty: write one JSON object a line")
    return records


def _records(path: Path, flag: str) -> list[tuple[str, Any]]:
    if not path.exists():
        raise UserError(f"{flag} {path} does not exist: give a file of JSON lines")
    try:
        with path.open("rb") as stream:
            found = json_records(stream, name=f"{flag} {path}")
            return [(record.place, record.value) for record in found]
    except OSError as error:
        raise UserError(
            f"{flag} {path} cannot be read ({error.strerror}): give a file of JSON lines"
        ) from error


def as_list(value: Any) -> Any:
    """One text as a list of one; anything else as it is."""
    return [value] if isinstance(value, str) else value


def fault_of_question(record: Any) -> str | None:
    """What a record of {question, answer: text or list of texts} lacks; None: nothing."""
    if not isinstance(record, dict) or not _is_text(record.get("question")):
        return "has no text in `question`"
    answers = as_list(record.get("answer"))
    is_text = isinstance(answers, list) and answers and all(map(_is_text, answers))
    return None if is_text else "has no text or list in `answer`"


def fault_of_ranking(record: Any) -> str | None:
    """What a record of {query, choices, gold} lacks; None: nothing."""
    if not isinstance(record, dict) or not isinstance(record.get("query"), str):
        return "has no text in `query`"
    choices, gold = record.get("choices"), record.get("gold")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        return "has no list of two or more texts in `choices`"
    if len({*choices}) < len(choices):
        return "has the same text twice in `choices`, of which neither can be the likelier one"
    is_index = isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(choices)
    return (
        None
        if is_index
        else f"has {_short(gold)} in `gold`, which is no index into its {len(choices)} choices"
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _fault_of_fields(record: dict[str, Any], names: Sequence[str]) -> str | None:
    if isinstance(record, RepeatedNames) and (repeated := sorted(record.repeated & {*names})):
        return f"has `{repeated[0]}` twice, with different values"
    for value in (record[name] for name in names):
        for text in value if isinstance(value, list | dict) else [value]:
            if isinstance(text, str) and (
                halves := [letter for letter in text if "\ud800" <= letter <= "\udfff"]
            ):
                return f"has half of a surrogate pair ({halves[0]!r}), which is no text"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


_TWO_LABELS, _THREE_LABELS = ("entailment", "not_entailment"), ("entailment", "contradiction", "neutral")
_VERDICTS = ("true", "false", "neither")
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        fields=("query", "choices", "gold"),
        fault_of=_fault_of_choices,
        questions=_each(_of_choices),
        optional=("group",),
    ),
    Layout(
        fields=("question", "mc1_targets"),
        fault_of=_fault_of_targets,
        questions=_each(_of_targets),
        optional=("mc2_targets",),
    ),
    Layout(
        fields=("question", "answer"),
        fault_of=_fault_of_answer,
        questions=_each(_of_answer),
        optional=("passage",),
    ),
    Layout(fields=("premise", "hypothesis", "label"), fault_of=_fault_of_pair, questions=_of_pairs),
    Layout(fields=("text", "label", "labels"), fault_of=_fault_of_label, questions=_each(_of_label)),
    Layout(fields=("text",), fault_of=_fault_of_last_word, questions=_each(_of_last_word)),
)
"""in the order in which they are tried"""
