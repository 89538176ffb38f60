"""Part of `evaluate`: score files and the units' summaries → eval.json, the page and the plots.

N positions of a split, V vocabulary.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.core.files import publish_bytes
from mlpmem_ds.core.stage_directory import StageDirectory
from mlpmem_ds.formats.corpus import CorpusSplit, num_tokens_of_splits, open_corpus
from mlpmem_ds.formats.evaluation import (
    DocumentSums,
    Evaluation,
    Machine,
    ReportManifest,
    Sample,
    Settings,
    write_document_sums,
    write_evaluation,
)
from mlpmem_ds.stages.evaluation.arms.arm import Arm
from mlpmem_ds.stages.evaluation.arms.mixed import MixedArm
from mlpmem_ds.stages.evaluation.inputs import Inputs
from mlpmem_ds.stages.evaluation.mixing import mix
from mlpmem_ds.stages.evaluation.samples import continue_samples
from mlpmem_ds.stages.evaluation.speed import measure_speeds
from mlpmem_ds.stages.evaluation.splits import Split
from mlpmem_ds.stages.evaluation.stored_scores import StoredScores, read_stored_scores
from mlpmem_ds.stages.evaluation.token_kinds import KINDS, kinds_of_positions, read_vocabulary_kinds
from mlpmem_ds.stages.evaluation.units import Unit
from mlpmem_ds.stages.report.breakdowns import KIND, Groups, entropy_groups, frequency_groups, shows_wins
from mlpmem_ds.stages.report.page import render_report
from mlpmem_ds.stages.report.plots import plot_costs, plot_lambda_curves, plot_speeds, plot_wins
from mlpmem_ds.stages.report.summary import ArmScores, Comparison, Summary, summarize
from mlpmem_ds.stages.report.table import render_table

_COUNTED_TOKENS = 1 << 22  # at a time


@dataclass(kw_only=True)
class ReportWriter:
    """Makes the report when every unit is complete."""

    inputs: Inputs
    units: Mapping[str, Unit]
    directory: StageDirectory
    """where the units' files lie, and the report will"""
    comparison: Comparison
    speed_positions: int | None
    """on which speed is measured; None = it is not"""
    num_samples: int
    """passages to continue"""
    table: str | None = None
    """what was found, for a terminal; None until the report is written"""

    def write(self) -> dict[str, Any]:
        """Publish eval.json, plots and page; the fields of the manifest."""
        evaluation = self._evaluate()
        write_report(self.directory.root, evaluation)
        self.table = render_table(evaluation)
        manifest = ReportManifest(
            tokens=evaluation.tokens,
            arms=tuple(arm.name for arm in evaluation.arms),
            settings=evaluation.settings,
        )
        return manifest.to_json()

    def _evaluate(self) -> Evaluation:
        inputs, comparison = self.inputs, self.comparison
        summaries = dict(zip(self.units, self.directory.summaries(list(self.units)), strict=True))
        test, base = inputs.splits[comparison.tests[0]], inputs.base
        stored = {
            arm.name: read_stored_scores(self.directory.root, arm, self.units.values())
            for arm in inputs.scorers
        }
        scores = [
            _arm_scores(arm, stored[arm.name], self.units, summaries, inputs.splits, test.corpus)
            for arm in inputs.arms
        ]
        scores += [self._mixed_scores(arm, stored, scores) for arm in inputs.mixed]
        summary = summarize(scores, comparison, _groups(scores[0], test))
        for name, split in inputs.splits.items():
            scores_of_split = {arm: by_split[name] for arm, by_split in summary.scores.items()}
            write_document_sums(self.directory.root, name, sum_documents(split, scores_of_split))
        return Evaluation(
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            machine=Machine(platform=platform.platform(), cores=os.cpu_count()),
            model=base.path,
            corpus=str(test.corpus.root),
            tuning_split=comparison.tuning,
            test_split=comparison.tests[0],
            extra_splits=comparison.tests[1:],
            tokens={name: split.num_positions for name, split in inputs.splits.items()},
            lambdas=comparison.grid.lambdas,
            settings=_settings(base.source.dtype_name, test.corpus, comparison, summaries),
            subject=comparison.subject,
            reference=comparison.reference,
            arms=summary.arms,
            recovered_share=summary.recovered_share,
            against=summary.against,
            wins=summary.wins,
            breakdowns=summary.breakdowns,
            speeds=measure_speeds(inputs.arms, base.forward_pass, test.corpus, self.speed_positions),
            samples=_samples(inputs, summary, test.corpus, self.num_samples),
            choices_from=comparison.choices_from,
        )

    def _mixed_scores(
        self, arm: MixedArm, stored: Mapping[str, StoredScores], scores: Sequence[ArmScores]
    ) -> ArmScores:
        """Of an arm that is made of others."""
        inputs, comparison = self.inputs, self.comparison
        given = None if comparison.choices is None or arm.gate is not None else comparison.choices[arm.name]
        mixed = mix(
            arm,
            stored,
            stored[inputs.base.name],
            inputs.splits,
            tuning=comparison.tuning,
            given=None if given is None else given.chosen,
        )
        rates = {one.name: one.tokens_per_second for one in scores}
        base_seconds = 1 / rates[inputs.base.name]
        seconds = base_seconds + sum(1 / rates[member.name] - base_seconds for member in arm.members)
        return ArmScores(
            name=arm.name,
            description=arm.description,
            scores=mixed.scores,
            guesses=mixed.guesses,
            stands_alone=False,
            parameters=arm.price.parameters,
            bytes=arm.price.bytes,
            seconds=arm.price.seconds,
            tokens=arm.price.tokens,
            tokens_per_second=1 / max(seconds, 1e-9),
            settings=arm.settings,
            weights=mixed.weights,
        )


def sum_documents(split: Split, scores: Mapping[str, np.ndarray]) -> DocumentSums:
    """The log-probabilities [N] of each arm, summed by document; those without a position are left out."""
    documents_N = split.corpus.documents_of(split.scored_positions)
    positions_M = np.bincount(documents_N)
    is_present_M = positions_M > 0
    return DocumentSums(
        positions_M=positions_M[is_present_M],
        sums={
            name: np.bincount(documents_N, weights=scores_N)[is_present_M]
            for name, scores_N in scores.items()
        },
    )


def _settings(
    dtype: str, corpus: CorpusSplit, comparison: Comparison, summaries: Mapping[str, Mapping[str, Any]]
) -> Settings:
    first = next(iter(summaries.values()))
    return Settings(
        bootstrap_samples=comparison.bootstrap_samples,
        bootstrap_block=comparison.bootstrap_block,
        block_size=corpus.block_size,
        stride=corpus.stride,
        dtype=dtype,
        device=first["device"],
        threads=first["threads"],
    )


def _samples(inputs: Inputs, summary: Summary, corpus: CorpusSplit, num_samples: int) -> tuple[Sample, ...]:
    """Text that the base and the subject continue."""
    for subject in inputs.playing("subject") if num_samples else ():
        found = next(arm for arm in summary.arms if arm.name == subject.name)
        joint = None if found.lmbda is None else subject.joint_model(found.lmbda, found.chosen)
        if joint is not None:
            return continue_samples(inputs.base.source.model, joint, corpus, num_samples)
    return ()


def _arm_scores(
    arm: Arm,
    stored: StoredScores,
    units: Mapping[str, Unit],
    summaries: Mapping[str, Mapping[str, Any]],
    splits: Mapping[str, Split],
    test: CorpusSplit,
) -> ArmScores:
    """An arm's scores by split, and its price."""
    guesses = _by_split(stored.guesses, splits)
    # The median: another program on the machine slows some units many times over.
    rates = [
        _tokens_per_second(arm, summaries[unit.name])
        for unit in units.values()
        if arm in unit.arms and unit.corpus.name == test.name
    ]
    own = arm.stands_alone
    return ArmScores(
        name=arm.name,
        description=arm.description,
        scores=_by_split(stored.values, splits),
        stands_alone=own,
        choices=tuple(arm.choices),
        gives_zeros=arm.gives_zeros,
        settings=arm.settings,
        parameters=arm.price.parameters,
        bytes=arm.price.bytes,
        seconds=arm.price.seconds,
        tokens=arm.price.tokens,
        tokens_per_second=float(np.median(rates)),
        guesses={name: rows[:, 0] if own else rows for name, rows in guesses.items()},
        is_correct={name: rows[:, 2] > 0 for name, rows in guesses.items()} if own else None,
        entropies={name: rows[:, 1] for name, rows in guesses.items()} if own else None,
    )


def _tokens_per_second(arm: Arm, summary: Mapping[str, Any]) -> float:
    return summary["positions"] / max(summary["pass_seconds"] + summary["seconds"][arm.name], 1e-9)


def _by_split(streams: Mapping[str, np.ndarray], splits: Mapping[str, Split]) -> dict[str, np.ndarray]:
    """Split → its rows of its stream."""
    return {name: split.take(streams[split.corpus.name]) for name, split in splits.items()}


def _groups(base: ArmScores, test: Split) -> list[Groups]:
    """The ways to part the test split's positions that the corpus allows."""
    corpus = test.corpus
    tokens_N = test.take(corpus.tokens(0, corpus.num_positions))
    values_N = test.take(corpus.values(0, corpus.num_positions))
    groups = []
    kinds = read_vocabulary_kinds(corpus.tokenizer_path, corpus.vocab_size, corpus.end_of_document_id)
    if kinds is not None:
        groups.append(
            Groups(name=KIND, labels=KINDS, group_of_N=kinds_of_positions(kinds, tokens_N, values_N))
        )
    assert base.entropies is not None  # the base stands alone
    groups.append(entropy_groups(base.entropies[test.name]))
    if corpus.name != "train" and num_tokens_of_splits(corpus.root).get("train", 0) >= 2:
        groups.append(frequency_groups(_count_tokens(open_corpus(corpus.root, "train")), values_N))
    return groups


def _count_tokens(corpus: CorpusSplit) -> np.ndarray:
    """How often each token occurs, int64 [V]."""
    counts_V = np.zeros(corpus.vocab_size, dtype=np.int64)
    for start in range(0, corpus.num_tokens, _COUNTED_TOKENS):
        tokens = corpus.tokens(start, min(start + _COUNTED_TOKENS, corpus.num_tokens))
        counts_V += np.bincount(tokens, minlength=corpus.vocab_size)
    return counts_V


def write_report(output: Path, evaluation: Evaluation) -> None:
    """Publish eval.json, the plots and report.md."""
    write_evaluation(output, evaluation)
    plot_lambda_curves(evaluation, output / "lambda.png")
    plot_costs(evaluation, output / "cost.png")
    if shows_wins(evaluation):
        plot_wins(evaluation, output / "wins.png")
    if evaluation.speeds:
        plot_speeds(evaluation, output / "speed.png")
    publish_bytes(output / "report.md", render_report(evaluation).encode())
