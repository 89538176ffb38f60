"""Part of `run_lm_eval`: `--suite`, tasks → scores of every document at every λ, and from them a table.

A unit is a task and a reader: a file with a line a document. Which λ is best is decided afterwards, from
those files (suite_results.py), so that the table is made again in seconds.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mlpmem_ds.core.files import content_hash, publish_bytes
from mlpmem_ds.core.log import Progress, log_for_all
from mlpmem_ds.core.run_description import check_output
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.verified_inputs import verify_inputs
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.hidden_states import resolve_dtype
from mlpmem_ds.engines.passage_index import require_bm25s
from mlpmem_ds.engines.suite_tasks import Document, Generation, Result, SuiteTask
from mlpmem_ds.formats.corpus import CorpusSplit, open_corpus
from mlpmem_ds.formats.suites import Suites, SuitesManifest, write_suites
from mlpmem_ds.models.mixture import Constant
from mlpmem_ds.stages.harness.config import Config
from mlpmem_ds.stages.harness.grid_scores import GATE_NAME, Weighting, mixed_by, score_continuations
from mlpmem_ds.stages.harness.halves import Halves, split_halves
from mlpmem_ds.stages.harness.lengths import check_context
from mlpmem_ds.stages.harness.readers import JOINT, Models, describe_arms, list_readers
from mlpmem_ds.stages.harness.suite_page import page_of
from mlpmem_ds.stages.harness.suite_results import TaskLines, read_lines, score_task
from mlpmem_ds.stages.harness.suites import Chosen, open_suites
from mlpmem_ds.stages.harness.task_scores import chances
from mlpmem_ds.stages.questions.answering import Answer, Answerer, answer
from mlpmem_ds.stages.questions.arms import Reader, hash_tokenizers
from mlpmem_ds.stages.questions.passages import Passages, open_passages, write_passages

_logger = logging.getLogger(__name__)
_PASSAGES = "passages"  # a unit that others read
_BINDING = (
    *("lambdas", "generation_lambdas", "limit", "special_tokens", "batch_size", "max_new_tokens", "dtype"),
    *("passages", "passage_tokens", "num_passages", "base_only_threshold"),
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A task, and those of its documents that are asked."""

    task: SuiteTask
    documents: Mapping[int, Document]
    halves: Halves


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A task and who reads it."""

    asked: Asked
    reader: Reader

    @property
    def name(self) -> str:
        return f"{self.asked.task.name}-{self.reader.name}"

    @property
    def file(self) -> str:
        return f"scores/{self.name}.jsonl"


def run_suite(config: Config, world: World) -> str | None:
    """Score what is missing; the rank that completes the last unit writes suites.json and suites.md, and
    returns the page."""
    assert config.output is not None
    check_output(config.output, stage=SuitesManifest.FORMAT)
    chosen = open_suites(config.suite, config.data)
    device = device_of_rank(config.device, world)
    readers, models = list_readers(config), Models(config, device)
    corpus = None
    if config.passages is not None:
        require_bm25s()
        corpus = open_corpus(config.passages, "train", flag="--passages")
    hashes = models.hashes(readers)
    limits = [models.context_limit(reader) for reader in readers]
    asked = [draw(task, config.limit) for task in chosen.tasks]  # last: a millisecond a document
    inputs = {f"task-{each.task.name}": _hash_of(each) for each in asked}
    for limit in limits:
        for each in asked:
            check_context(each.task, each.documents.values(), limit, config.max_new_tokens)
    directory = open_stage(
        config.output,
        stage=SuitesManifest.FORMAT,
        version=SuitesManifest.VERSION,
        config=config,
        inputs={
            **hashes,
            **hash_tokenizers(limits),
            **inputs,
            **({} if corpus is None else {"passages": corpus.sha256}),
        },
        world=world,
        resolved={"dtype": resolve_dtype(config.dtype, device)},
        flags=_BINDING,
    )
    for name, reason in chosen.left_out.items():
        log_for_all(_logger, world, "left out: %s (%s)", name, reason)
    stage = _Suite(config, world, directory, chosen, asked, readers, models, corpus, device)
    stage.score_all()
    return stage.page


def draw(task: SuiteTask, limit: int | None) -> Asked:
    """At most `limit` documents of a task, in two halves."""
    documents = task.documents()
    halves = split_halves([document.group for document in documents], limit)
    return Asked(task=task, documents={number: documents[number] for number in halves.asked}, halves=halves)


def _hash_of(asked: Asked) -> str:
    """Of all that decides what is asked and how it is scored."""
    generation = asked.task.generation
    settings = None if generation is None else [list(generation.stops), generation.max_new_tokens]
    documents = [
        [
            *(number, document.group),
            *([[each.context, each.continuation] for each in document.requests], dict(document.record)),
        ]
        for number, document in asked.documents.items()
    ]
    return content_hash([dict(asked.task.metadata), settings, documents])


class _Suite:
    """One start of the command."""

    def __init__(
        self,
        config: Config,
        world: World,
        directory: StageDirectory,
        chosen: Chosen,
        asked: Sequence[Asked],
        readers: list[Reader],
        models: Models,
        corpus: CorpusSplit | None,
        device: torch.device,
    ) -> None:
        self._config, self._world, self._directory, self._chosen = config, world, directory, chosen
        self._asked, self._readers, self._models, self._corpus = asked, readers, models, corpus
        self._device = device
        self._units = {unit.name: unit for unit in self._list_units()}
        self._passages: Passages | None = None
        self.page: str | None = None

    def _list_units(self) -> Iterator[Unit]:
        """Reader by reader, so that a model is loaded once; passages are of use to open questions alone."""
        for reader in self._readers:
            for asked in self._asked:
                if not reader.with_passages or asked.task.generation is not None:
                    yield Unit(asked=asked, reader=reader)

    def score_all(self) -> None:
        names = list(self._units)
        if self._corpus is not None:
            verify_inputs(self._directory, self._corpus, self._corpus.stream_files, label="passages")
            write = partial(write_passages, corpus=self._corpus, num_tokens=self._config.passage_tokens)
            self._directory.run_phase([_PASSAGES], lambda _, writer: write(writer))
            assert self._config.output is not None
            self._passages = open_passages(self._config.output)
            names = [_PASSAGES, *names]
        total = sum(len(unit.asked.documents) for unit in self._units.values()) // self._world.size
        self._progress = Progress(total, label="scoring", unit="documents", world=self._world)
        self._directory.run_units(list(self._units), self._score_unit)
        self._progress.close()
        self._directory.complete(names, self._describe)

    # -- a unit

    def _score_unit(self, name: str, writer: UnitWriter) -> dict[str, Any]:
        unit, start = self._units[name], time.perf_counter()
        task = unit.asked.task
        answerer = self._models.of(unit.reader, begin_tokens=bool(task.metadata["begin_tokens"]))
        weighting = self._models.weighting(unit.reader, generates=task.generation is not None)
        speeds: dict[str, list[float]] = {}
        if task.generation is None:
            lines = self._score_choices(unit, answerer, weighting)
        else:
            lines, speeds = self._generate(unit, answerer, weighting, task.generation)
        tuning = set(unit.asked.halves.tuning)
        with writer.file(unit.file) as path, path.open("w", encoding="utf-8") as stream:
            for number, line in lines.items():
                half = "tuning" if number in tuning else "reported"
                document = unit.asked.documents[number]
                guess = chances(
                    task.metadata["chance"], document.record, task.num_choices(document), task.metrics
                )
                whole = {"document": number, "half": half, **line, "chance": guess}
                stream.write(json.dumps(whole, ensure_ascii=False) + "\n")
        if num_cut := sum(line["cut"] for line in lines.values()):
            _logger.warning(
                "%s: %d of %d prompts are longer than the model reads: their beginning was cut off",
                name, num_cut, len(lines),
            )  # fmt: skip
        seconds = time.perf_counter() - start
        return {
            "weightings": list(weighting.names),
            "seconds": seconds,
            "speeds": speeds,
            "num_cut": num_cut,
        }

    def _score_choices(
        self, unit: Unit, answerer: Answerer, weighting: Weighting
    ) -> dict[int, dict[str, Any]]:
        """Of each document: metric → score at each weighting. Each context is read once, however many
        documents and choices ask for it."""
        task = unit.asked.task
        continuations: dict[str, dict[str, None]] = {}
        for document in unit.asked.documents.values():
            for request in document.requests:
                assert request.continuation is not None
                continuations.setdefault(request.context, {})[request.continuation] = None
        found: dict[tuple[str, str], Any] = {}

        def results_at(document: Document, place: int) -> list[Result]:
            pairs = [found[request.context, request.continuation or ""] for request in document.requests]
            return [(pair.log_probabilities[place], pair.is_greedy[place]) for pair in pairs]

        lines = {}
        for number, document in unit.asked.documents.items():
            for context in dict.fromkeys(request.context for request in document.requests):
                if (asked := continuations.pop(context, None)) is not None:
                    scored = score_continuations(
                        answerer, context, list(asked), weighting, with_greedy=task.asks_for_greedy
                    )
                    found |= {(context, text): one for text, one in zip(asked, scored, strict=True)}
            each = [
                task.scores(document, results_at(document, place)) for place in range(len(weighting.names))
            ]
            is_cut = any(
                found[request.context, request.continuation or ""].is_cut for request in document.requests
            )
            lines[number] = {"scores": _by_metric(task, each), "cut": is_cut}
            self._progress.advance(1, task.name)
        return lines

    def _generate(
        self, unit: Unit, answerer: Answerer, weighting: Weighting, generation: Generation
    ) -> tuple[dict[int, dict[str, Any]], dict[str, list[float]]]:
        """Of each document the answers and their scores at each weighting; and weighting → [seconds to the
        first token, seconds, tokens], sums over the documents."""
        task, documents = unit.asked.task, unit.asked.documents
        limit = self._config.max_new_tokens or generation.max_new_tokens
        prompts, searched = self._prompts(unit, answerer, limit)
        answers: dict[int, list[Answer]] = {number: [] for number in documents}
        for name in weighting.names:
            with _weighted(answerer.model, weighting, name):
                # The first batch of all is slower than the others: one is asked that is not timed.
                first_batch = [prompts[number] for number in list(documents)[: self._config.batch_size]]
                answer(answerer, first_batch, min(limit, 2), stops=generation.stops)
                for some in _batches(list(documents), self._config.batch_size):
                    asked = [prompts[number] for number in some]
                    found = answer(answerer, asked, limit, stops=generation.stops)
                    for number, one in zip(some, found, strict=True):
                        answers[number].append(one)
                    self._progress.advance(0, f"{task.name}, λ = {name}")
        speeds = {}
        for place, name in enumerate(weighting.names):
            own = [each[place] for each in answers.values()]
            first = sum(one.first_token_seconds for one in own) + searched
            seconds = sum(one.seconds for one in own) + searched
            speeds[name] = [first, seconds, float(sum(one.num_tokens for one in own))]
        lines = {}
        for number, document in documents.items():
            texts = [one.text for one in answers[number]]
            each = [task.scores(document, [text]) for text in texts]
            is_cut = any(one.is_cut for one in answers[number])
            lines[number] = {"answers": texts, "scores": _by_metric(task, each), "cut": is_cut}
            self._progress.advance(1, task.name)
        return lines, speeds

    def _prompts(self, unit: Unit, answerer: Answerer, limit: int) -> tuple[dict[int, str], float]:
        """The prompt of each document, with passages where the reader reads some, and the seconds that their
        search took."""
        prompts = {number: document.prompt for number, document in unit.asked.documents.items()}
        if not unit.reader.with_passages:
            return prompts, 0.0
        assert self._passages is not None
        start = time.perf_counter()
        found = {
            number: self._passages.prompt(
                prompt,
                query=unit.asked.documents[number].record["question"],
                count=self._config.num_passages,
                max_tokens=answerer.context - limit,
                encoder=answerer.encoder,
            )
            for number, prompt in prompts.items()
        }
        return found, time.perf_counter() - start

    # -- the end

    def _describe(self) -> SuitesManifest:
        root = self._config.output
        assert root is not None
        scored, names = [], list[str]()
        for asked in self._asked:
            own = {unit.reader.name: unit for unit in self._units.values() if unit.asked.task is asked.task}
            lines = {}
            for reader, unit in own.items():
                [summary] = self._directory.summaries([unit.name])
                lines[reader] = TaskLines(
                    weightings=tuple(summary["weightings"]),
                    lines=read_lines(root / unit.file),
                    speeds=summary["speeds"],
                    seconds=summary["seconds"],
                    num_cut=summary["num_cut"],
                )
            names += [name for name in lines[JOINT].weightings if name not in names]
            groups = {number: document.group for number, document in asked.documents.items()}
            samples = self._config.bootstrap_samples
            scored.append(score_task(asked.task.name, asked.task.metadata, lines, samples, groups=groups))
        suites = Suites(
            suites=tuple(self._config.suite),
            arms=describe_arms(self._readers, names),
            tasks=tuple(scored),
            left_out=self._chosen.left_out,
            device=str(self._device),
        )
        write_suites(root / "suites.json", suites)
        self.page = page_of(suites)
        publish_bytes(root / "suites.md", self.page.encode())
        return SuitesManifest(
            tasks={asked.task.name: len(asked.documents) for asked in self._asked},
            readers=tuple(reader.name for reader in self._readers),
            left_out=self._chosen.left_out,
        )


def _weighted(model: Any, weighting: Weighting, name: str) -> AbstractContextManager[None]:
    """Let base and memory be mixed as the weighting of this name says: a number, without a threshold, so that
    it is what a choice is scored by; or the model's own gate and threshold."""
    if not hasattr(model, "set_gate"):
        return mixed_by(model, None, threshold=None)
    if name == GATE_NAME:
        return mixed_by(model, weighting.gate, threshold=model.base_only_threshold)
    return mixed_by(model, Constant(float(name)), threshold=None)


def _by_metric(task: SuiteTask, each: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {metric: [round(scores[metric], 6) for scores in each] for metric in task.metrics}


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
