"""Part of `run_lm_eval`: questions and rankings in local files → tasks of the harness, checked by line."""

from __future__ import annotations

import collections
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.lm_eval import encode_pair
from mlpmem_ds.engines.tokenizer import TextEncoder
from mlpmem_ds.formats.question_files import (
    ABOVE_OPEN_QUESTIONS,
    as_list,
    fault_of_question,
    fault_of_ranking,
    open_prompt,
    read_records,
)
from mlpmem_ds.stages.harness.config import Config

_QUESTIONS, _RANKING = "local_questions", "local_ranking"
_DELIMITER = " "
_ANSWER_TOKENS = 32
_logger = logging.getLogger(__name__)


def build_tasks(config: Config, folder: Path) -> list[str | dict[str, Any]]:
    """Tasks for the harness: names, and whole configurations for the local files, which are checked by line.

    Args:
        folder: receives copies of the files with the fields of the task alone, answers always as lists.

    Raises:
        UserError: a file is missing, a line is not as the flag says, or there are too few examples.
    """
    tasks: list[str | dict[str, Any]] = []
    if config.questions is not None:
        records = read_records(config.questions, "--questions", ("question", "answer"), fault_of_question)
        questions = [{**record, "answer": as_list(record["answer"])} for record in records]
        _check_repetitions(questions, "question", f"--questions {config.questions}", config.num_fewshot)
        tasks.append(_questions_task(_write_lines(folder / "questions.jsonl", questions)))
    if config.ranking is not None:
        names = ("query", "choices", "gold")
        rankings = read_records(config.ranking, "--ranking", names, fault_of_ranking)
        _check_repetitions(rankings, "query", f"--ranking {config.ranking}", config.num_fewshot)
        tasks.append(_ranking_task(_write_lines(folder / "ranking.jsonl", rankings)))
    return [*tasks, *dict.fromkeys(config.tasks)]


def check_lengths(
    tasks: Sequence[str | Mapping[str, Any]], encoder: TextEncoder, context: int | None
) -> None:
    """Raises UserError where the model reads too few tokens (`context`, None: any number) for an answer or a
    choice of the local tasks."""
    for task in tasks:
        if isinstance(task, str) or context is None:
            continue
        if task["task"] == _QUESTIONS:
            if context <= _ANSWER_TOKENS:
                raise UserError(
                    f"--questions: an answer has up to {_ANSWER_TOKENS} tokens, and the model reads {context}"
                    " with the question: ask by --ranking"
                )
            continue
        [path] = task["dataset_kwargs"]["data_files"].values()
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n")[:-1], start=1):
            _check_choices(json.loads(line), f"--ranking: record {number}", encoder, context)


def _check_choices(record: Mapping[str, Any], name: str, encoder: TextEncoder, context: int) -> None:
    for number, choice in enumerate(record["choices"], start=1):
        try:
            _, ids = encode_pair(encoder, record["query"], _DELIMITER + choice)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        if len(ids) > context:
            raise UserError(
                f"{name}: choice {number} has {len(ids):,} tokens, and the model reads {context:,}: shorten"
                " it, or leave the record out"
            )


def _questions_task(path: Path) -> dict[str, Any]:
    """NQ-open's prompt, stops and exact match (as the harness's own task), on local questions; the prompt is
    that of `answer_questions`."""
    return {
        "task": _QUESTIONS,
        **_local_data(path, "question"),
        "output_type": "generate_until",
        "description": ABOVE_OPEN_QUESTIONS,
        "doc_to_text": open_prompt,
        "doc_to_target": "answer",
        "fewshot_delimiter": "\n",
        "target_delimiter": _DELIMITER,
        "generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": _ANSWER_TOKENS},
        "filter_list": [
            {
                "name": "remove_whitespace",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": True,
                "regexes_to_ignore": ["\\b(?:The |the |An |A |a |an )"],
            }
        ],
    }


def _ranking_task(path: Path) -> dict[str, Any]:
    """The choice with the greatest log-probability after the query; also normalized by its bytes."""
    metrics = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ]
    return {
        "task": _RANKING,
        **_local_data(path, "query"),
        "output_type": "multiple_choice",
        "doc_to_text": "query",  # fields by name: a template would make a number of a query of digits
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": _DELIMITER,
        "metric_list": metrics,
    }


def _local_data(path: Path, same_question: str) -> dict[str, Any]:
    """One split is asked and gives the examples: a test split, because then none is the question itself."""
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path.resolve())}},
        "test_split": "validation",
        "fewshot_split": "validation",
        "metadata": {"version": 1.0, "same_question": same_question},
    }


def _check_repetitions(
    records: Sequence[Mapping[str, Any]], name: str, source: str, num_fewshot: int | None
) -> None:
    """Say what is asked more than once; examples of a question are other questions, of which there must be
    enough."""
    counts = collections.Counter(record[name] for record in records)
    num_others = len(records) - max(counts.values())
    if num_fewshot is not None and num_fewshot > num_others:
        raise UserError(
            f"--num-fewshot {num_fewshot}: the examples of a question are other questions, and {source} has"
            f" {num_others} besides each: give --num-fewshot {num_others}, or a larger file"
        )
    if num_repeated := sum(count > 1 for count in counts.values()):
        _logger.warning(
            "%s asks %d of its questions more than once: each counts as often as it stands there",
            source, num_repeated,
        )  # fmt: skip


def _write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
