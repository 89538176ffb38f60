"""Part of `quality`: results of one preset with different seeds → one result, so that seeds can be trained on
different days, or on different machines of one kind.

What is reported joins exactly: a value is the mean of the seeds' own, an interval holds the interval of each
seed (bootstrap.py). Seconds and times of jobs stay those of the machines that they were measured on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlpmem_ds.benchmarks.quality.arms import BASE
from mlpmem_ds.benchmarks.quality.bootstrap import hull
from mlpmem_ds.benchmarks.quality.figures import FIXED_ARMS
from mlpmem_ds.benchmarks.quality.ratios import RATIOS
from mlpmem_ds.benchmarks.quality.results import (
    ArmRow,
    Interval,
    QualityResult,
    RatioResult,
    TextResult,
    read_result,
)
from mlpmem_ds.core.errors import UserError

_SAME_PPL = 1e-4  # relative: of one base on one text; another processor may round differently


def read_others(
    paths: Sequence[Path], settings: Mapping[str, str], seeds: Sequence[int]
) -> list[QualityResult]:
    """The results that are to be joined with one of these settings and seeds, before any of its jobs begins.

    Raises:
        UserError: a file is missing, of other settings, or has a seed that another one has too.
        DamagedDataError: a file is no result.
    """
    owner: dict[int, str] = {seed: "this run" for seed in seeds}
    results = []
    for path in paths:
        if not path.is_file():
            raise UserError(f"--join {path}: no such file; it takes the quality.json of another run")
        result = read_result(path)
        if dict(result.settings) != dict(settings):
            raise UserError(
                f"--join {path} is of {_flags(result.settings)}, this run of {_flags(settings)}: leave it out"
            )
        for seed in result.seeds:
            if seed in owner:
                raise UserError(
                    f"--join {path} has seed {seed}, as {owner[seed]} has: choose others with --first-seed"
                )
            owner[seed] = str(path)
        results.append(result)
    return results


def join_results(results: Sequence[QualityResult]) -> QualityResult:
    """One result with the seeds of all.

    Args:
        results: of one preset, no seed twice.

    Raises:
        UserError: they are of different texts, flags or arms, or of a base that differs.
    """
    results = sorted(results, key=lambda result: result.seeds)
    _check_same("the base", results, lambda result: result.base)
    _check_same("the flags", results, lambda result: dict(result.settings))
    _check_same("the texts", results, lambda result: [_identity(text) for text in result.texts])
    _check_same("the arms", results, lambda result: [row.arm for text in result.texts for row in text.rows])
    _check_same("the ratios", results, lambda result: [_key(ratio) for ratio in result.ratios])
    texts = zip(*(result.texts for result in results), strict=True)
    ratios = zip(*(result.ratios for result in results), strict=True)
    return replace(
        max(results, key=lambda result: result.date),
        machine="; ".join(dict.fromkeys(result.machine for result in results)),
        seeds=tuple(seed for result in results for seed in result.seeds),
        left_out=tuple(dict.fromkeys(arm for result in results for arm in result.left_out)),
        texts=tuple(map(_joined_text, texts)),
        ratios=tuple(map(_joined_ratio, ratios)),
        questions=next((result.questions for result in results if result.questions), ()),
        job_seconds=_joined_seconds([result.job_seconds for result in results]),
    )


def _flags(settings: Mapping[str, str]) -> str:
    return " ".join(f"--{name} {value}" for name, value in settings.items())


def _check_same(
    what: str, results: Sequence[QualityResult], part_of: Callable[[QualityResult], object]
) -> None:
    first = results[0]
    for result in results[1:]:
        if part_of(result) != part_of(first):
            raise UserError(
                f"the results with the seeds {_names(first)} and {_names(result)} cannot be joined: {what}"
                f" differ: {part_of(first)} and {part_of(result)}"
            )


def _names(result: QualityResult) -> str:
    return ", ".join(map(str, result.seeds))


def _identity(text: TextResult) -> tuple[object, ...]:
    return text.name, text.title, dict(text.positions), text.documents


def _key(ratio: RatioResult) -> tuple[str, str, str]:
    return ratio.name, ratio.text, ratio.goal


def _joined_text(texts: Sequence[TextResult]) -> TextResult:
    rows = zip(*(text.rows for text in texts), strict=True)
    return replace(texts[0], rows=tuple(_joined_row(row_parts, texts[0].title) for row_parts in rows))


def _check_same_base(ppls: Sequence[float], text: str) -> None:
    lowest, highest = min(ppls), max(ppls)
    if not math.isclose(lowest, highest, rel_tol=_SAME_PPL):
        raise UserError(
            f"the results cannot be joined: the base has perplexity {lowest:.4f} on {text} in one and"
            f" {highest:.4f} in another, so these are two bases: train all seeds on machines of one kind,"
            " with the same packages"
        )


def _joined_row(rows: Sequence[ArmRow], text: str) -> ArmRow:
    first = rows[0]
    if first.arm == BASE:
        _check_same_base([row.ppl for row in rows], text)
    if first.arm in FIXED_ARMS:
        return first
    ppl_by_seed = tuple(ppl for row in rows for ppl in row.ppl_by_seed)
    weights = [row.seeds for row in rows]
    tokens = _mean_of_present([row.tokens for row in rows], weights)
    return replace(
        first,
        seeds=sum(weights),
        ppl=float(np.exp(np.mean(np.log(ppl_by_seed)))),
        ppl_by_seed=ppl_by_seed,
        change=_mean([row.change for row in rows], weights),
        interval=_hull([row.interval for row in rows]),
        bits_per_byte=float(np.average([row.bits_per_byte for row in rows], weights=weights)),
        calibration_error=float(np.average([row.calibration_error for row in rows], weights=weights)),
        lambdas=tuple(lmbda for row in rows for lmbda in row.lambdas),
        other_change=_mean([row.other_change for row in rows], weights),
        other_interval=_hull([row.other_interval for row in rows]),
        tokens=None if tokens is None else round(tokens),
        seconds=_mean_of_present([row.seconds for row in rows], weights),
        epochs_used_up=_joined_epochs([row.epochs_used_up for row in rows]),
    )


def _joined_ratio(parts: Sequence[RatioResult]) -> RatioResult:
    name = parts[0].name
    ratio = next((one for one in RATIOS if one.name == name), None)
    if ratio is None:
        raise UserError(f"{name} is a ratio of another version of the benchmark: run all seeds with this one")
    by_seed = [value for part in parts for value in part.by_seed]
    interval = _hull([part.interval for part in parts])
    values = [value for value in by_seed if value is not None]
    return ratio.judged(
        parts[0].text,
        value=float(np.mean(values)) if interval is not None and len(values) == len(by_seed) else None,
        interval=interval,
        by_seed=by_seed,
        # Where the joined interval is on one side of the goal, each part's is, and is unclear only by this.
        is_defined=all(part.is_clear for part in parts),
    )


def _joined_epochs(parts: Sequence[tuple[float, ...] | None]) -> tuple[float, ...] | None:
    """None where one is missing."""
    found = [part for part in parts if part is not None]
    return tuple(epochs for part in found for epochs in part) if len(found) == len(parts) else None


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.average(found, weights=weights)) if len(found) == len(values) else None


def _mean_of_present(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    """Of those that are not None; None where all are."""
    present = [number for number, value in enumerate(values) if value is not None]
    found = [values[number] for number in present]
    return _mean(found, [weights[number] for number in present]) if found else None


def _joined_seconds(all_seconds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each job; what no seed changes was done in each run, and stays as the first has it."""
    joined: dict[str, float] = {}
    for seconds in reversed(all_seconds):
        joined.update(seconds)
    return dict(sorted(joined.items()))


def _hull(intervals: Sequence[Interval | None]) -> Interval | None:
    """None where one is missing."""
    found = [interval for interval in intervals if interval is not None]
    return hull(found) if len(found) == len(intervals) else None
