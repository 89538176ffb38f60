"""Part of `evaluate`: score files and the units' summaries → eval.json, the page and the plots.

N positions of a split, V vocabulary.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.core.files import publish_bytes
from mlpmem_ds.core.stage_directory import StageDirectory
from mlpmem_ds.formats.corpus import CorpusSplit, num_tokens_of_splits, open_corpus
from mlpmem_ds.formats.evaluation import Evaluation, Machine, Sample, Settings, write_evaluation
from mlpmem_ds.stages.evaluation.arms.arm import Arm
from mlpmem_ds.stages.evaluation.inputs import Inputs
from mlpmem_ds.stages.evaluation.samples import continue_samples
from mlpmem_ds.stages.evaluation.speed import measure_speeds
from mlpmem_ds.stages.evaluation.splits import Split
from mlpmem_ds.stages.evaluation.token_kinds import KINDS, kinds_of_positions, read_vocabulary_kinds
from mlpmem_ds.stages.evaluation.units import Unit
from mlpmem_ds.stages.report.breakdowns import KIND, Groups, entropy_groups, frequency_groups, shows_wins
from mlpmem_ds.stages.report.page import render_report
from mlpmem_ds.stages.report.plots import plot_costs, plot_lambda_curves, plot_speeds, plot_wins
from mlpmem_ds.stages.report.summary import ArmScores, Comparison, Summary, summarize

_COUNTED_TOKENS = 1 << 22  # at a time


def evaluate_scores(
    inputs: Inputs,
    units: Mapping[str, Unit],
    directory: StageDirectory,
    comparison: Comparison,
    *,
    speed_positions: int | None,
    num_samples: int,
) -> Evaluation:
    """Everything that eval.json says, from the score files and the units' summaries.

    Args:
        inputs: the splits and the arms.
        units: all of them, complete.
        directory: where they lie.
        comparison: how the arms are compared.
        speed_positions: on which speed is measured; None = it is not.
        num_samples: passages to continue.
    """
    summaries = {name: directory.read_record(name)["summary"] for name in units}
    test, arms = inputs.splits[comparison.tests[0]], inputs.arms
    scores = [
        _read_scores(arm, units, summaries, inputs.splits, test.corpus, directory.root) for arm in arms.all
    ]
    summary = summarize(scores, comparison, _groups(scores[0], test))
    return Evaluation(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=Machine(platform=platform.platform(), cores=os.cpu_count()),
        model=arms.base.path,
        corpus=str(test.corpus.root),
        tuning_split=comparison.tuning,
        test_split=comparison.tests[0],
        extra_splits=comparison.tests[1:],
        tokens={name: split.num_positions for name, split in inputs.splits.items()},
        lambdas=comparison.grid.lambdas,
        settings=_settings(arms.base.source.dtype_name, test.corpus, comparison, summaries),
        subject=comparison.subject,
        reference=comparison.reference,
        arms=summary.arms,
        recovered_share=summary.recovered_share,
        against=summary.against,
        wins=summary.wins,
        breakdowns=summary.breakdowns,
        speeds=measure_speeds(arms.all, arms.base.forward_pass, test.corpus, speed_positions),
        samples=_samples(inputs, summary, test.corpus, num_samples),
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
    subject = inputs.arms.subject
    if subject is None or num_samples == 0:
        return ()
    lmbda = next(arm.lmbda for arm in summary.arms if arm.name == subject.name)
    assert lmbda is not None  # it is mixed with the base
    return continue_samples(inputs.arms.base.source.model, subject.joint_model(lmbda), corpus, num_samples)


def _read_scores(
    arm: Arm,
    units: Mapping[str, Unit],
    summaries: Mapping[str, Mapping[str, Any]],
    splits: Mapping[str, Split],
    test: CorpusSplit,
    root: Path,
) -> ArmScores:
    """An arm's scores by split, and its price."""
    mine = [unit for unit in units.values() if arm in unit.arms]
    guesses = _by_split(root, [(unit.corpus.name, unit.guess_file(arm)) for unit in mine], splits)
    # The median: another program on the machine slows some units many times over.
    rates = [_tokens_per_second(arm, summaries[unit.name]) for unit in mine if unit.corpus.name == test.name]
    own = arm.stands_alone
    return ArmScores(
        name=arm.name,
        description=arm.description,
        scores=_by_split(root, [(unit.corpus.name, unit.score_file(arm)) for unit in mine], splits),
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


def _by_split(
    root: Path, files: Sequence[tuple[str, str]], splits: Mapping[str, Split]
) -> dict[str, np.ndarray]:
    """Split → the rows of these files (stream, name), in their order."""
    parts: dict[str, list[np.ndarray]] = {}
    for stream, name in files:
        parts.setdefault(stream, []).append(np.load(root / name, allow_pickle=False))
    streams = {stream: np.concatenate(arrays) for stream, arrays in parts.items()}
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
