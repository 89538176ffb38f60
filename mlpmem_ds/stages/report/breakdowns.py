"""Part of `evaluate`: where an arm wins and loses, and whether its probabilities mean what they say.

N positions of a split, G groups, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlpmem_ds.formats.evaluation import Breakdown, Calibration, CalibrationBin, Evaluation, GroupFigures
from mlpmem_ds.maths.scores import calibration_error, reliability

CALIBRATION_BINS = 15
ENTROPY_EDGES = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
"""in nats"""
FREQUENCY_EDGES = (1, 10, 100, 1000, 10_000)
"""occurrences in the training split"""
ENTROPY, FREQUENCY, KIND = (
    "entropy of the base, nats",
    "occurrences of the token in training",
    "kind of token",
)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """A way to part the positions of the test split."""

    name: str
    labels: tuple[str, ...]
    """of each group"""
    group_of_N: np.ndarray
    """int64: each position's group"""


def entropy_groups(entropies_N: np.ndarray) -> Groups:
    """By how unsure the base is; known before the token is, so that no group is chosen by its outcome."""
    labels = _labels(
        [f"{edge:g}" for edge in ENTROPY_EDGES], first="below {}", middle="{} to {}", last="{} and more"
    )
    return Groups(
        name=ENTROPY, labels=labels, group_of_N=np.searchsorted(ENTROPY_EDGES, entropies_N, side="right")
    )


def frequency_groups(counts_V: np.ndarray, values_N: np.ndarray) -> Groups:
    """By how often the value occurs in the training split."""
    names = [f"{edge:,}" for edge in FREQUENCY_EDGES]
    inner = [
        f"{low:,} to {high - 1:,}" for low, high in zip(FREQUENCY_EDGES, FREQUENCY_EDGES[1:], strict=False)
    ]
    labels = ("never", *inner, f"{names[-1]} and more")
    return Groups(
        name=FREQUENCY,
        labels=labels,
        group_of_N=np.searchsorted(FREQUENCY_EDGES, counts_V[values_N], side="right"),
    )


def breakdown(groups: Groups, base_N: np.ndarray, arms: Mapping[str, np.ndarray]) -> Breakdown:
    """Per group and arm: perplexity, its change against the base, the share of positions won, and nats won
    and lost, as `GroupFigures` says.

    Args:
        base_N: the base's natural log-probabilities.
        arms: each arm's own, at its chosen λ.
    """
    num_groups, num_positions = len(groups.labels), len(base_N)
    positions_G = np.bincount(groups.group_of_N, minlength=num_groups)

    def means(values_N: np.ndarray) -> np.ndarray:
        sums_G: np.ndarray = np.bincount(groups.group_of_N, weights=values_N, minlength=num_groups)
        return sums_G / np.maximum(positions_G, 1)

    base_means_G = means(base_N.astype(np.float64))
    share_G = positions_G / num_positions
    figures = {}
    for name, arm_N in arms.items():
        gains_N = arm_N.astype(np.float64) - base_N
        figures[name] = GroupFigures(
            ppl=_or_none(np.exp(-means(arm_N)), positions_G),
            ppl_change=_or_none(np.expm1(base_means_G - means(arm_N)), positions_G),
            win_rate=_or_none(means((gains_N > 0) + 0.5 * (gains_N == 0)), positions_G),
            won=tuple((means(np.maximum(gains_N, 0)) * share_G).tolist()),
            lost=tuple((means(np.minimum(gains_N, 0)) * share_G).tolist()),
        )
    return Breakdown(
        name=groups.name,
        labels=groups.labels,
        positions=tuple(positions_G.tolist()),
        base_ppl=_or_none(np.exp(-base_means_G), positions_G),
        arms=figures,
    )


def calibration(log_probabilities_N: np.ndarray, is_correct_N: np.ndarray) -> Calibration:
    """Expected calibration error of the probabilities given to one guess a position, and the bins that it is
    made of."""
    probabilities_N = np.exp(log_probabilities_N.astype(np.float64))
    counts_B, means_B, shares_B = reliability(probabilities_N, is_correct_N, CALIBRATION_BINS)
    bins = tuple(
        CalibrationBin(positions=int(count), probability=float(mean), correct=float(share))
        for count, mean, share in zip(counts_B, means_B, shares_B, strict=True)
        if count
    )
    return Calibration(error=calibration_error(probabilities_N, is_correct_N, CALIBRATION_BINS), bins=bins)


def _labels(edges: Sequence[str], *, first: str, middle: str, last: str) -> tuple[str, ...]:
    inner = [middle.format(low, high) for low, high in zip(edges, edges[1:], strict=False)]
    return (first.format(edges[0]), *inner, last.format(edges[-1]))


def _or_none(values_G: np.ndarray, positions_G: np.ndarray) -> tuple[float | None, ...]:
    """As Python's numbers; None for a group without positions."""
    return tuple(
        float(value) if positions else None for value, positions in zip(values_G, positions_G, strict=True)
    )


def shows_wins(evaluation: Evaluation) -> bool:
    """Whether there is an arm besides the base to compare with it by the kind of token."""
    return any(breakdown.name == KIND and breakdown.arms for breakdown in evaluation.breakdowns)
