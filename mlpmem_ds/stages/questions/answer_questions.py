"""`answer_questions`: question sets in local files, answered by several arms, in one table.

A unit is a block of questions of one set, answered by one arm: a file with a line a question. The table is
made afterwards from those files, paired question by question. No harness is needed (`run_lm_eval` asks an
export through the lm-evaluation-harness).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from mlpmem_ds.core.blocks import Block, split_blocks
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import content_hash
from mlpmem_ds.core.hashing import shuffled
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.verified_inputs import verify_inputs
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.hidden_states import resolve_dtype
from mlpmem_ds.engines.passage_index import require_bm25s
from mlpmem_ds.formats.answers import Answers, AnswersManifest, SetScores, write_answers
from mlpmem_ds.formats.corpus import CorpusSplit, open_corpus
from mlpmem_ds.formats.question_files import ABOVE_OPEN_QUESTIONS, Question, read_questions
from mlpmem_ds.stages.questions.answer_scores import contains, exact_match, f1, short_answer
from mlpmem_ds.stages.questions.answering import Answer, Answerer, Choice, answer, score_choices
from mlpmem_ds.stages.questions.arms import Answerers, Arm, hash_models, hash_tokenizers, list_arms
from mlpmem_ds.stages.questions.config import Config, set_name
from mlpmem_ds.stages.questions.lengths import check_questions
from mlpmem_ds.stages.questions.passages import Passages, open_passages, write_passages
from mlpmem_ds.stages.questions.results import read_scores, render, score_set

_logger = logging.getLogger(__name__)
_PASSAGES = "passages"  # a unit that the others read
_SEED = 0  # of the examples
_Asked: TypeAlias = tuple[dict[str, Any], dict[str, float]]
"""a line of a unit's file, and what the answer took"""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Questions of one set, and the arm that answers them."""

    set: str
    arm: Arm
    block: Block

    @property
    def name(self) -> str:
        return f"{self.set}-{self.arm.name}-{self.block.start:06d}"

    @property
    def file(self) -> str:
        return f"answers/{self.name}.jsonl"


def run(config: Config, world: World) -> str | None:
    """Answer what is missing; the rank that completes the last unit writes answers.json and returns the
    table."""
    whole = {set_name(path): read_questions(path) for path in config.questions}
    sets = {name: questions[: config.limit] for name, questions in whole.items()}
    examples = {name: draw_examples(name, questions, config.num_fewshot) for name, questions in whole.items()}
    arms = list_arms(config)
    corpus = None
    if config.passages is not None:
        require_bm25s()
        corpus = open_corpus(config.passages, "train", flag="--passages")
    device = device_of_rank(config.device, world)
    asked = {name: [*sets[name], *examples[name]] for name in sets}
    inputs = {f"questions-{name}": _hash_of(questions) for name, questions in asked.items()}
    hashes, answerers = hash_models(arms), Answerers(config, device)
    limits = answerers.context_limits(arms)
    for name, questions in sets.items():
        check_questions(name, questions, limits, config.max_new_tokens)
    directory = open_stage(
        config.output,
        stage=AnswersManifest.FORMAT,
        version=AnswersManifest.VERSION,
        config=config,
        inputs={
            **hashes,
            **hash_tokenizers(limits),
            **inputs,
            **({} if corpus is None else {"passages": corpus.sha256}),
        },
        world=world,
        resolved={"dtype": resolve_dtype(config.dtype, device)},
    )
    units = {unit.name: unit for unit in _list_units(sets, arms, config.unit_questions)}
    stage = _Answering(config, world, directory, sets, examples, units, arms, corpus, answerers)
    stage.answer_all()
    return stage.table


def draw_examples(name: str, questions: list[Question], count: int) -> list[Question]:
    """Questions of a set to take examples from, one more than are needed, all different.

    Raises:
        UserError: there are too few.
    """
    if count == 0 or questions[0].kind != "open":
        return []
    different = list({question.prompt: question for question in questions}.values())
    if len(different) <= count:
        raise UserError(
            f"--num-fewshot {count}: the examples of a question are other questions, and {name} has"
            f" {len(different) - 1} besides each: give at most as many"
        )
    return [different[number] for number in shuffled(len(different), _SEED)[: count + 1]]


def prompt_with_examples(question: Question, examples: list[Question], count: int) -> str:
    """An open question as it is asked: behind a line that says what to do, and `count` answered examples that
    are other questions."""
    others = [example for example in examples if example.prompt != question.prompt][:count]
    answered = "".join(f"{other.prompt} {other.answers[0]}\n" for other in others)
    return f"{ABOVE_OPEN_QUESTIONS}{answered}{question.prompt}"


def _hash_of(questions: list[Question]) -> str:
    return content_hash([[each.kind, each.prompt, list(each.answers), each.gold] for each in questions])


def _list_units(sets: Mapping[str, list[Question]], arms: list[Arm], size: int) -> list[Unit]:
    """Arm by arm, so that a model is loaded once; passages are of use to open questions alone."""
    return [
        Unit(set=name, arm=arm, block=block)
        for arm in arms
        for name, questions in sets.items()
        if not arm.with_passages or questions[0].kind == "open"
        for block in split_blocks(len(questions), size)
    ]


def _score_choices_of(question: Question, scored: Sequence[Choice]) -> dict[str, Any]:
    """A line of the unit's file."""
    if question.kind == "last word":
        [choice] = scored
        scores = {"accuracy": float(choice.is_greedy)}
        return {"log_probability": choice.log_probability, "scores": scores, **_mark_of(choice)}
    logs = [choice.log_probability for choice in scored]
    by_byte = [log / len(text.encode()) for log, text in zip(logs, question.answers, strict=True)]
    scores = {
        "accuracy": float(logs.index(max(logs)) == question.gold),
        "accuracy_by_byte": float(by_byte.index(max(by_byte)) == question.gold),
    }
    return {"log_probabilities": logs, "scores": scores, **_mark_of(*scored)}


def _mark_of(*results: Answer | Choice) -> dict[str, bool]:
    """Of a line whose prompt lost its beginning."""
    return {"cut": True} if any(each.is_cut for each in results) else {}


class _Answering:
    """One start of the command."""

    def __init__(
        self,
        config: Config,
        world: World,
        directory: StageDirectory,
        sets: Mapping[str, list[Question]],
        examples: Mapping[str, list[Question]],
        units: Mapping[str, Unit],
        arms: list[Arm],
        corpus: CorpusSplit | None,
        answerers: Answerers,
    ) -> None:
        self._config, self._world, self._directory = config, world, directory
        self._sets, self._examples = sets, examples
        self._units, self._arms, self._corpus = units, arms, corpus
        self._answerers = answerers
        self._passages: Passages | None = None
        self._begun: set[tuple[str, str]] = set()
        """(arm, kind of question) that this process has asked"""
        self.table: str | None = None

    def answer_all(self) -> None:
        names = list(self._units)
        if self._corpus is not None:
            verify_inputs(self._directory, self._corpus, self._corpus.stream_files, label="passages")
            write = partial(write_passages, corpus=self._corpus, num_tokens=self._config.passage_tokens)
            self._directory.run_phase([_PASSAGES], lambda _, writer: write(writer))
            self._passages = open_passages(self._config.output)
            names = [_PASSAGES, *names]
        count = sum(unit.block.size for unit in self._units.values()) // self._world.size
        self._progress = Progress(count, label="answering", unit="questions", world=self._world)
        self._directory.run_units(list(self._units), self._answer_unit)
        self._progress.close()
        self._directory.complete(names, self._describe)

    # -- a unit

    def _answer_unit(self, name: str, writer: UnitWriter) -> dict[str, Any]:
        unit = self._units[name]
        answerer = self._answerers.of(unit.arm)
        counts = dict.fromkeys(("questions", "num_cut", "tokens"), 0)
        lines, totals = [], {**counts, "seconds": 0.0, "first_token_seconds": 0.0}
        questions = self._sets[unit.set]
        for first in range(unit.block.start, unit.block.stop, self._config.batch):
            numbers = range(first, min(first + self._config.batch, unit.block.stop))
            asked = self._ask_timed(answerer, unit, [questions[number] for number in numbers])
            for number, (line, spent) in zip(numbers, asked, strict=True):
                lines.append(json.dumps({"question": number, **line}, ensure_ascii=False))
                totals["questions"] += 1
                totals["num_cut"] += line.get("cut", False)
                for key, value in spent.items():
                    totals[key] += value
            self._progress.advance(len(numbers))
        with writer.file(unit.file) as path:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        if num_cut := totals["num_cut"]:
            _logger.warning(
                "%s: %d of %d prompts are longer than the model reads: their beginning was cut off",
                name, num_cut, len(lines),
            )  # fmt: skip
        return totals

    def _ask_timed(self, answerer: Answerer, unit: Unit, questions: Sequence[Question]) -> list[_Asked]:
        """As `_ask`. The first batch of all is slower than the others: it is asked twice, for two tokens at
        first."""
        max_new_tokens = self._config.max_new_tokens
        if (begun := (unit.arm.name, questions[0].kind)) not in self._begun:
            self._ask(answerer, unit, questions, max_new_tokens=min(max_new_tokens, 2))
            self._begun.add(begun)
        return self._ask(answerer, unit, questions, max_new_tokens=max_new_tokens)

    def _ask(
        self, answerer: Answerer, unit: Unit, questions: Sequence[Question], *, max_new_tokens: int
    ) -> list[_Asked]:
        """Of each question of a batch a line of the unit's file, and what the answer took."""
        if questions[0].kind == "open":
            return self._ask_in_words(answerer, unit, questions, max_new_tokens)
        start = time.perf_counter()
        pairs = [(question.prompt, question.answers) for question in questions]
        scored = score_choices(answerer, pairs, batch=self._config.batch)
        spent = {"seconds": (time.perf_counter() - start) / len(questions)}
        return [
            (_score_choices_of(question, choices), spent)
            for question, choices in zip(questions, scored, strict=True)
        ]

    def _ask_in_words(
        self, answerer: Answerer, unit: Unit, questions: Sequence[Question], max_new_tokens: int
    ) -> list[_Asked]:
        start, prompts = time.perf_counter(), []
        for question in questions:
            prompt = prompt_with_examples(question, self._examples[unit.set], self._config.num_fewshot)
            if unit.arm.with_passages:
                assert self._passages is not None
                prompt = self._passages.prompt(
                    prompt,
                    query=question.prompt,
                    count=self._config.num_passages,
                    max_tokens=answerer.context - self._config.max_new_tokens,
                    encoder=answerer.encoder,
                )
            prompts.append(prompt)
        searched = time.perf_counter() - start if unit.arm.with_passages else 0.0
        asked = []
        for question, found in zip(questions, answer(answerer, prompts, max_new_tokens), strict=True):
            short = short_answer(found.text)
            scores = {
                "exact_match": exact_match(short, question.answers),
                "f1": f1(short, question.answers),
                "contains": contains(found.text, question.answers),
            }
            spent = {
                "seconds": searched / len(questions) + found.seconds,
                "first_token_seconds": searched + found.first_token_seconds,
                "tokens": found.num_tokens,
            }
            asked.append(({"answer": found.text, "scores": scores, **_mark_of(found)}, spent))
        return asked

    # -- the end

    def _describe(self) -> AnswersManifest:
        sets = [self._score_set(name) for name in self._sets]
        answers = Answers(
            arms={arm.name: arm.description for arm in self._arms},
            sets=tuple(sets),
            passages=None if self._passages is None else len(self._passages.texts),
            index_bytes=None if self._passages is None else self._passages.num_bytes,
            device=str(self._answerers.device),
        )
        write_answers(self._config.output / "answers.json", answers)
        self.table = render(sets)
        return AnswersManifest(
            arms=tuple(arm.name for arm in self._arms),
            sets={name: len(questions) for name, questions in self._sets.items()},
        )

    def _score_set(self, name: str) -> SetScores:
        units: dict[str, list[Unit]] = {}
        for unit in self._units.values():
            if unit.set == name:
                units.setdefault(unit.arm.name, []).append(unit)
        root: Path = self._config.output
        return score_set(
            name,
            self._sets[name][0].kind,
            {arm: read_scores([root / unit.file for unit in own]) for arm, own in units.items()},
            {arm: self._directory.summaries([unit.name for unit in own]) for arm, own in units.items()},
            self._config.bootstrap_samples,
            groups=[
                number if question.group is None else question.group
                for number, question in enumerate(self._sets[name])
            ],
        )
