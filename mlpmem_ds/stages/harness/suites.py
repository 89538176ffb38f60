"""Part of `run_lm_eval`: which tasks a suite has, their local files, and what is left out.

A suite is a list of names; a name is a file of `tasks/`, and its local data is DIR/NAME.jsonl, or
DIR/NAME.*.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.suite_tasks import MissingDataSetError, SuiteTask, TaskFile, open_task, read_task_file
from mlpmem_ds.formats.question_files import as_list, fault_of_question, read_layout, read_records
from mlpmem_ds.stages.harness.config import Suite
from mlpmem_ds.stages.harness.hub_records import truthful_record

TASKS_FOLDER = Path(__file__).with_name("tasks")
_HALUEVAL = ("halueval_dialogue", "halueval_qa", "halueval_summarization")
_NINE = ("sst2", "mr", "cr", "rotten_tomatoes", "hyp", "cb", "rte", "agn", "yahoo")
SUITES: Mapping[str, tuple[str, ...]] = {
    "paper": (
        *("nq_open", "webquestions", "triviaqa", "truthfulqa_mc", "hotpotqa"),
        *("2wikimultihop", "musique", "bamboogle", "lambada", "piqa", "boolq", "strategyqa", "logiqa"),
        *_HALUEVAL,
        *_NINE,
    ),
    "at-scale": (
        *("arc_easy", "arc_challenge", "lambada", "logiqa", "piqa", "sciq", "winogrande", "mmlu"),
        *("nq_open", "triviaqa", "popqa", "2wikimultihop", "bamboogle", "hotpotqa", "gpqa_main"),
        *("truthfulqa_mc", *_HALUEVAL),
    ),
    "nine": _NINE,
}
"""suite → tasks. `paper`: what the papers on MLP Memory and its neighbours report, with `nine`, the tasks
that are scored by domain-conditional PMI; `at-scale`: of Memory Decoder at Scale."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The tasks of the suites with their data, and why others are not among them: name → reason."""

    tasks: tuple[SuiteTask, ...]
    left_out: Mapping[str, str]


def open_suites(suites: Sequence[Suite], data: Path | None) -> Chosen:
    """The tasks of the suites, each once, from the files of a directory, or (None) from the Hub.

    Raises:
        UserError: the harness is missing; a file cannot be read; the directory has none of the files, or the
            Hub none of the data sets.
    """
    names = list(dict.fromkeys(name for suite in suites for name in SUITES[suite]))
    files = [read_task_file(TASKS_FOLDER / f"{name}.yaml") for name in names]
    tasks, left_out = list[SuiteTask](), dict[str, str]()
    if data is None:
        for file in files:
            try:
                tasks.append(open_task(file, None))
            except MissingDataSetError as error:
                left_out[file.name] = str(error)
        if not tasks:
            name, reason = next(iter(left_out.items()))
            raise UserError(
                f"no task of --suite can be had; {name}: {reason}; or give --data DIR, local files"
            )
        return Chosen(tasks=tuple(tasks), left_out=left_out)
    for file in files:
        path = _local_file(data, file.name)
        if "layout" not in file.metadata:
            left_out[file.name] = "it is read from the Hub alone"
        elif path is None:
            left_out[file.name] = f"--data {data} has no {file.name}.jsonl"
        else:
            tasks.append(open_task(file, read_local(path, file)))
    if not tasks:
        raise UserError(
            f"--data {data} has none of the files of --suite {' '.join(suites)}: give a directory with"
            f" {', '.join(f'{name}.jsonl' for name in names[:3])}, … (docs/suites.md has their layouts)"
        )
    return Chosen(tasks=tuple(tasks), left_out=left_out)


def _local_file(folder: Path, name: str) -> Path | None:
    """NAME.jsonl or NAME.*.jsonl. Raises UserError where there are several."""
    found = sorted({*folder.glob(f"{name}.jsonl"), *folder.glob(f"{name}.*.jsonl")})
    if len(found) > 1:
        raise UserError(
            f"--data {folder} has several files of {name}: {', '.join(path.name for path in found)}; leave"
            " one there"
        )
    return found[0] if found else None


def read_local(path: Path, file: TaskFile) -> list[dict[str, Any]]:
    """The records of a local file, checked by line, with the fields that the task's templates read.

    Raises:
        UserError: the file cannot be read, or a line is not of the task's layout.
    """
    return _LAYOUTS[file.metadata["layout"]](path, file)


def _open_questions(path: Path, _: TaskFile) -> list[dict[str, Any]]:
    records = read_records(path, "--data", ("question", "answer"), fault_of_question)
    return [{**record, "answer": as_list(record["answer"])} for record in records]


def _truths(path: Path, _: TaskFile) -> list[dict[str, Any]]:
    records = read_layout(path, ("question", "answer"), flag="--data")
    for number, record in enumerate(records, start=1):
        if not isinstance(record["answer"], bool):
            raise UserError(f"--data {path}, record {number} has no true or false in `answer`")
    return [{"passage": "", **record} for record in records]


def _targets(path: Path, _: TaskFile) -> list[dict[str, Any]]:
    records = read_layout(path, ("question", "mc1_targets"), flag="--data")
    return [
        truthful_record(
            record["question"], record["mc1_targets"], record.get("mc2_targets") or record["mc1_targets"]
        )
        for record in records
    ]


def _choices(path: Path, _: TaskFile) -> list[dict[str, Any]]:
    return read_layout(path, ("query", "choices", "gold"), flag="--data")


def _grouped_choices(path: Path, file: TaskFile) -> list[dict[str, Any]]:
    records = _choices(path, file)
    for number, record in enumerate(records, start=1):
        if "group" not in record:
            raise UserError(
                f"--data {path}, record {number} has no `group`: give the two answers to a question the same"
                " text there, so that λ is not chosen on one of them and reported on the other"
            )
    return records


def _labels(path: Path, file: TaskFile) -> list[dict[str, Any]]:
    """A label is known by its name, in whichever order a record has the names."""
    names = file.metadata["label_names"]
    words = [*enumerate(file.config["doc_to_choice"]), *enumerate(names)]
    places = {text.casefold(): place for place, text in words}
    found = []
    for number, record in enumerate(read_layout(path, ("text", "label", "labels"), flag="--data"), start=1):
        classes = [places.get(name.strip().casefold(), -1) for name in record["labels"]]
        if sorted(classes) != list(range(len(names))):
            raise UserError(
                f"--data {path}, record {number} has the labels {', '.join(record['labels'])}, and task"
                f" {file.name} asks for {', '.join(names)}: rename them, or give the task's own file"
            )
        found.append({"text": record["text"], "label": classes[record["label"]]})
    return found


def _pairs(path: Path, file: TaskFile) -> list[dict[str, Any]]:
    names, found = file.metadata["label_names"], []
    records = read_layout(path, ("premise", "hypothesis", "label"), flag="--data")
    for number, record in enumerate(records, start=1):
        if record["label"] not in names:
            raise UserError(
                f"--data {path}, record {number} has the label {record['label']}, and task {file.name} asks"
                f" for {', '.join(names)}: give the task's own file"
            )
        found.append({**record, "label": names.index(record["label"])})
    return found


def _last_words(path: Path, _: TaskFile) -> list[dict[str, Any]]:
    records = read_layout(path, ("text",), flag="--data")
    return [{"text": record["text"].rstrip()} for record in records]


_LAYOUTS: Mapping[str, Callable[[Path, TaskFile], list[dict[str, Any]]]] = {
    "open": _open_questions,
    "truth": _truths,
    "targets": _targets,
    "choices": _choices,
    "grouped choices": _grouped_choices,
    "label": _labels,
    "pair": _pairs,
    "last word": _last_words,
}
