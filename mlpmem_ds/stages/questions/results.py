"""Part of `answer_questions`: the units' lines and summaries → means, paired intervals, speeds, the table.

Q questions, R resamples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.formats.answers import ArmScores, SetScores
from mlpmem_ds.stages.questions.arms import BASE
from mlpmem_ds.stages.report.table import aligned_columns

_SEED = 0


def interval_of_change(
    base_Q: np.ndarray, other_Q: np.ndarray, num_resamples: int, groups: Sequence[str | int] | None = None
) -> tuple[float, float]:
    """95 % interval of the mean of `other - base`, by a bootstrap over the questions, the same for both.

    `groups`: of each question; those of a group are drawn together. None: each is drawn for itself.
    """
    differences_Q = other_Q - base_Q
    places = {group: place for place, group in enumerate(dict.fromkeys(groups or ()))}
    group_of_Q = np.array([places[group] for group in groups]) if groups else np.arange(len(differences_Q))
    sums_G, counts_G = np.bincount(group_of_Q, weights=differences_Q), np.bincount(group_of_Q)
    generator = np.random.default_rng(_SEED)
    draws = (generator.integers(len(sums_G), size=len(sums_G)) for _ in range(num_resamples))
    means_R = [sums_G[drawn].sum() / counts_G[drawn].sum() for drawn in draws]
    low, high = np.quantile(means_R, [0.025, 0.975])
    return float(low), float(high)


def read_scores(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Metric → score of each question, of an arm's files of one set in their order."""
    lines = [
        json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").split("\n") if line
    ]
    return {metric: np.array([line["scores"][metric] for line in lines]) for metric in lines[0]["scores"]}


def score_set(
    name: str,
    kind: str,
    scores: Mapping[str, Mapping[str, np.ndarray]],
    summaries: Mapping[str, Sequence[Mapping[str, Any]]],
    num_resamples: int,
    *,
    groups: Sequence[str | int],
) -> SetScores:
    """A set's figures.

    Args:
        name: of the set.
        kind: of its questions.
        scores: arm → metric → [Q], the base first.
        summaries: arm → those of its units.
        num_resamples: for the intervals.
        groups: of each question; those of a group are drawn together.
    """
    base, rows = scores[BASE], []
    for arm, metrics in scores.items():
        totals = {key: sum(each[key] for each in summaries[arm]) for key in summaries[arm][0]}
        others = {} if arm == BASE else metrics
        rows.append(
            ArmScores(
                arm=arm,
                scores={metric: float(values_Q.mean()) for metric, values_Q in metrics.items()},
                changes={
                    metric: float(values_Q.mean() - base[metric].mean())
                    for metric, values_Q in others.items()
                },
                intervals={
                    metric: interval_of_change(base[metric], values_Q, num_resamples, groups)
                    for metric, values_Q in others.items()
                },
                seconds=totals["seconds"],
                first_token_seconds=(
                    totals["first_token_seconds"] / totals["questions"] if totals["tokens"] else None
                ),
                tokens_per_second=totals["tokens"] / totals["seconds"] if totals["tokens"] else None,
            )
        )
    count = len(next(iter(base.values())))
    return SetScores(name=name, kind=kind, questions=count, arms=tuple(rows))


def render(sets: Sequence[SetScores]) -> str:
    """Aligned columns: set, arm, each metric with its change, speed."""
    cells = [["set", "arm", "score", "against the base (95 %)", "first token", "tokens/s"]]
    for each in sets:
        for row in each.arms:
            for number, (metric, value) in enumerate(row.scores.items()):
                change = ""
                if metric in row.changes:
                    low, high = row.intervals[metric]
                    change = f"{100 * row.changes[metric]:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})"
                timed = number == 0 and row.first_token_seconds is not None
                cells.append(
                    [
                        f"{each.name} ({each.questions})" if number == 0 else "",
                        row.arm if number == 0 else "",
                        f"{metric} {100 * value:.1f} %",
                        change,
                        f"{1000 * (row.first_token_seconds or 0):.0f} ms" if timed else "",
                        f"{row.tokens_per_second:.1f}" if timed else "",
                    ]
                )
    return aligned_columns(cells)
