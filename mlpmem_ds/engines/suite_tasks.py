"""Tasks in YAML files of ours → prompts, requests and scores, a document at a time, by the harness (lm_eval).

The harness renders the prompts and scores the answers, as it would for any model; who answers is not its
business here: every λ of a mixture is scored from one forward pass, which its own loop cannot. Two things are
ours: a task may read records of a local file in the place of its data set on the Hub, and an unconditional
request (an empty context) of a task that names a `domain` is asked after that text.

`metadata` of a task's file: `title`; `layout`, of its local records; `label_names`, of the classes in such a
file, in the order of the choices; `begin_tokens`, whether the tokenizer's
begin tokens stand before a prompt; `tuned_by`, the metric by which λ is chosen; `chance`, how it is reckoned;
`domain`, the text for the second term of domain-conditional PMI.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError, first_line
from mlpmem_ds.engines.lm_eval import INSTALL, require_harness

Result = tuple[float, bool] | str
"""of a request: log-probability and whether it is the likeliest; or the text"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a model is asked: how likely the continuation is after the context, or (None) to go on."""

    context: str
    continuation: str | None


@dataclass(frozen=True, kw_only=True)
class Document:
    """An item of a task with its requests, the first of which holds the prompt."""

    number: int
    """in the data"""
    record: Mapping[str, Any] = field(repr=False)
    requests: tuple[Request, ...]

    @property
    def prompt(self) -> str:
        return self.requests[0].context

    @property
    def group(self) -> str:
        """What several documents about one thing have in common: the record's `group`, else the prompt."""
        return self.record.get("group") or self.prompt


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How a text is generated: greedily, up to one of the stops."""

    stops: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """A task's YAML file, read; its data is not."""

    name: str
    config: Mapping[str, Any] = field(repr=False)

    @property
    def metadata(self) -> Mapping[str, Any]:
        metadata: Mapping[str, Any] = self.config["metadata"]
        return metadata


def read_task_file(path: Path) -> TaskFile:
    """Read a task's file and those that it includes.

    Raises:
        UserError: the harness is not installed, or of a release that reads such files in another way.
    """
    require_harness()
    try:
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        raise UserError(
            f"--suite: this release of the lm-evaluation-harness reads tasks in another way ({error}):"
            f" {INSTALL}"
        ) from error

    return TaskFile(name=path.stem, config=load_yaml(path))


class SuiteTask:
    """A task with its data; `open_task` makes one."""

    def __init__(self, file: TaskFile, task: Any) -> None:
        self._task, self._records = task, task.eval_docs
        self.name, self.metadata = file.name, file.metadata

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(entry["metric"] for entry in self._task.config.metric_list)

    @property
    def asks_for_greedy(self) -> bool:
        """Whether the score is that each token is the likeliest one."""
        return bool(self._task.OUTPUT_TYPE == "loglikelihood")

    @property
    def generation(self) -> Generation | None:
        """None: nothing is generated."""
        if self._task.OUTPUT_TYPE != "generate_until":
            return None
        settings = self._task.config.generation_kwargs
        return Generation(stops=tuple(settings["until"]), max_new_tokens=int(settings["max_gen_toks"]))

    def documents(self) -> list[Document]:
        """All items in the order of the data.

        Raises:
            UserError: an item's label is not one of its choices.
        """
        found, domain = [], self.metadata.get("domain")
        for number, record in enumerate(self._records):
            context = self._task.fewshot_context(record, num_fewshot=self._task.config.num_fewshot or 0)
            asked = self._task.construct_requests(
                doc=record, ctx=context, metadata=(self.name, number, 1), apply_chat_template=False
            )
            requests = []
            for instance in asked if isinstance(asked, list) else [asked]:
                before, after = instance.args
                before = domain if domain is not None and not before else before
                requests.append(
                    Request(context=before, continuation=after if isinstance(after, str) else None)
                )
            self._check_gold(record, number)
            found.append(Document(number=number, record=record, requests=tuple(requests)))
        return found

    def num_choices(self, document: Document) -> int:
        """Of a document whose requests are choices."""
        return len(document.requests) // (2 if self.metadata.get("domain") is not None else 1)

    def scores(self, document: Document, results: Sequence[Result]) -> dict[str, float]:
        """Metric → score, of the results of the document's requests in their order."""
        found = self._task.process_results(document.record, list(results))
        return {metric: float(found[metric]) for metric in self.metrics}

    def _check_gold(self, record: Mapping[str, Any], number: int) -> None:
        if self._task.OUTPUT_TYPE != "multiple_choice" or self._task.multiple_input:
            return
        gold, count = self._task.doc_to_target(record), len(self._task.doc_to_choice(record))
        if not isinstance(gold, int) or not 0 <= gold < count:
            raise UserError(_wrong_label(self.name, number))


class MissingDataSetError(UserError):
    """The Hub does not give a task's data set."""


def open_task(file: TaskFile, records: Sequence[Mapping[str, Any]] | None) -> SuiteTask:
    """A task with these records, or (None) with its data set of the Hub.

    Raises:
        MissingDataSetError: the data set cannot be had.
        UserError: a record's label is not one of the choices.
    """
    from lm_eval.tasks import TaskManager

    config = {**file.config, "fewshot_split": file.config["test_split"]}  # no task has examples of its own
    if records is not None:
        from datasets import Dataset

        rows, split = [dict(record) for record in records], config["test_split"]
        config["custom_dataset"] = lambda **_: {split: Dataset.from_list(rows)}
        config.pop("process_docs", None)
    try:
        with _without_remarks():
            [task] = TaskManager(include_defaults=False).load([config])["tasks"].values()
    except Exception as error:  # each library under this raises a family of its own
        if isinstance(error, IndexError) and records is not None:  # the harness tries the first item
            raise UserError(_wrong_label(file.name, 0)) from error
        if records is not None:
            raise
        raise MissingDataSetError(
            f"its data set {config['dataset_path']} cannot be loaded from the Hub ({first_line(error)}):"
            " check the network; where its terms have to be accepted, do so on its page, then `hf auth login`"
        ) from error
    return SuiteTask(file, task)


def _wrong_label(name: str, number: int) -> str:
    return f"task {name}: item {number + 1} has a label that is none of the task's choices: give its own file"


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """The harness remarks on each task with local records that they could be given arguments."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
