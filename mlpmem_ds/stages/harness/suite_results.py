"""Part of `run_lm_eval`: scores of every document at every λ → the λ of each task, means, paired intervals.

λ is the one with the best mean on the tuning half (the smallest of several, so that a memory that does not
help is left out); all else is of the reported half.

D documents of a half, G weightings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.formats.suites import SuiteArm, SuiteMetric, SuiteSpeed, TaskScores
from mlpmem_ds.stages.harness.grid_scores import GATE_NAME
from mlpmem_ds.stages.harness.readers import ALONE, GATE, JOINT
from mlpmem_ds.stages.questions.arms import BASE, MEMORY
from mlpmem_ds.stages.questions.results import interval_of_change


@dataclass(frozen=True, kw_only=True)
class TaskLines:
    """A reader's unit: the weightings, a line a document, and weighting → [seconds to the first token,
    seconds, tokens], sums over the documents."""

    weightings: tuple[str, ...]
    lines: Sequence[Mapping[str, Any]]
    speeds: Mapping[str, Sequence[float]]
    seconds: float
    num_cut: int
    """documents whose prompt lost its beginning"""

    def scores(self, metric: str, half: str) -> np.ndarray:
        """float64 [D, G]."""
        rows = [line["scores"][metric] for line in self.lines if line["half"] == half]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self.weightings))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a unit's file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def best_place(means_G: np.ndarray) -> int:
    """Where the best mean stands first; means that differ by rounding are equal."""
    return int(np.argmax(means_G >= means_G.max() - 1e-9))


def score_task(
    name: str,
    metadata: Mapping[str, Any],
    readers: Mapping[str, TaskLines],
    num_resamples: int,
    *,
    groups: Mapping[int, str],
) -> TaskScores:
    """A task's figures.

    Args:
        name: of the task.
        metadata: of its file.
        readers: name → its lines; base and memory are `joint`.
        num_resamples: for the intervals.
        groups: document → its group: documents of a group are drawn together.
    """
    joint, tuned_by = readers[JOINT], metadata["tuned_by"]
    lambdas = [place for place, weight in enumerate(joint.weightings) if weight != GATE_NAME]
    tuning_DG = joint.scores(tuned_by, "tuning")
    chosen = 0
    if len(tuning_DG) and len(lambdas) > 1:
        chosen = best_place(tuning_DG[:, lambdas].mean(axis=0))
    places = {BASE: (JOINT, 0)}
    if len(lambdas) > 1:
        places |= {MEMORY: (JOINT, chosen), ALONE: (JOINT, lambdas[-1])}
    if GATE_NAME in joint.weightings:
        places[GATE] = (JOINT, joint.weightings.index(GATE_NAME))
    places |= {reader: (reader, 0) for reader in readers if reader != JOINT}
    halves = [line["half"] for line in joint.lines]
    reported_groups = [groups[line["document"]] for line in joint.lines if line["half"] == "reported"]
    interval = partial(interval_of_change, num_resamples=num_resamples, groups=reported_groups)
    return TaskScores(
        name=name,
        title=metadata["title"],
        tuning=halves.count("tuning"),
        reported=halves.count("reported"),
        begin_tokens=bool(metadata["begin_tokens"]),
        tuned_by=tuned_by,
        lmbda=float(joint.weightings[chosen]) if len(lambdas) > 1 else None,
        metrics=tuple(
            _score_metric(metric, readers, places, lambdas, interval) for metric in joint.lines[0]["scores"]
        ),
        speeds=tuple(_speeds(readers, places)),
        seconds=sum(each.seconds for each in readers.values()),
        cut={reader: each.num_cut for reader, each in readers.items() if each.num_cut},
    )


def _score_metric(
    metric: str,
    readers: Mapping[str, TaskLines],
    places: Mapping[str, tuple[str, int]],
    lambdas: Sequence[int],
    interval: Callable[[np.ndarray, np.ndarray], tuple[float, float]],
) -> SuiteMetric:
    joint = readers[JOINT]
    base_D = joint.scores(metric, "reported")[:, 0]
    arms = []
    for arm, (reader, place) in places.items():
        values_D = readers[reader].scores(metric, "reported")[:, place]
        weight = joint.weightings[place] if reader == JOINT else GATE_NAME
        other = arm != BASE
        arms.append(
            SuiteArm(
                arm=arm,
                lmbda=None if weight == GATE_NAME else float(weight),
                value=float(values_D.mean()),
                change=float(values_D.mean() - base_D.mean()) if other else None,
                interval=interval(base_D, values_D) if other else None,
            )
        )
    guesses = [
        line["chance"][metric]
        for line in joint.lines
        if line["half"] == "reported" and metric in line["chance"]
    ]
    return SuiteMetric(
        metric=metric,
        chance=float(np.mean(guesses)) if guesses else None,
        arms=tuple(arms),
        curve=_curve(joint, metric, "reported", lambdas),
        tuning_curve=_curve(joint, metric, "tuning", lambdas),
    )


def _curve(joint: TaskLines, metric: str, half: str, lambdas: Sequence[int]) -> dict[str, float]:
    scores_DG = joint.scores(metric, half)
    if not len(scores_DG):
        return {}
    return {joint.weightings[place]: float(scores_DG[:, place].mean()) for place in lambdas}


def _speeds(readers: Mapping[str, TaskLines], places: Mapping[str, tuple[str, int]]) -> list[SuiteSpeed]:
    found = []
    for arm, (reader, place) in places.items():
        lines = readers[reader]
        if lines.speeds:
            first, seconds, tokens = lines.speeds[lines.weightings[place]]
            found.append(
                SuiteSpeed(
                    arm=arm,
                    first_token_seconds=first / len(lines.lines),
                    tokens_per_second=tokens / seconds,
                )
            )
    return found
