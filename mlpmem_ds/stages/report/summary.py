"""Part of `evaluate`: log-probabilities of the arms → the figures that eval.json, page and plots show.

An *arm* is one way to predict: a model alone (the base, a control), or the base mixed with something else,
with weight λ. Nothing here runs a model: every figure is made from stored log-probabilities, two a position
and arm, so that another λ, temperature or split costs no forward pass. Natural logarithms, float64.

N positions of a split, T choices of an arm (temperature and neighbours of a kNN), G grid of λ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlpmem_ds.formats.evaluation import (
    ArmFigures,
    Breakdown,
    Calibration,
    Change,
    CurvePoint,
    SplitFigures,
)
from mlpmem_ds.formats.gates import WeightFigures
from mlpmem_ds.maths.scores import bits_per_byte, bootstrap_interval, perplexity, win_rate
from mlpmem_ds.models.mixture import Grid, share_of_all
from mlpmem_ds.models.mixture_scores import lambda_curve, mixed_scores
from mlpmem_ds.stages.report.breakdowns import Groups, breakdown, calibration

_MIN_DOCUMENTS = 20  # of a split, for an interval over documents


@dataclass(frozen=True, kw_only=True)
class GivenWeights:
    """λ of an arm at each position, which is not chosen from a grid: by split, float64 [N]; `figures` of the
    weights of its memories; `chosen` the fixed weight of each, empty where a gate gave them."""

    lambdas: Mapping[str, np.ndarray]
    figures: Mapping[str, WeightFigures]
    chosen: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ArmScores:
    """What an arm said of every position, and its price: plain numbers, from which all figures are made.

    `scores` holds for each split the natural log-probabilities of the values: [N], or [N, T] with a column
    for each of `choices`. Where it `stands_alone` they are its own; else they are mixed with the base's.

    `guesses`, for the calibration: the log-probability given to one token a position, in the shape of
    `scores`. An arm that stands alone guesses its own likeliest token; `is_correct` [N] says where it was the
    value, and `entropies` [N] of its distribution are in nats. The others guess the base's likeliest token,
    and have None for these two.

    `weights`: the λ of each position, where it is not one for all that is chosen from the grid.

    `gives_zeros`: some tokens have no probability at all, so that λ = 1 is not among its choices.
    """

    name: str
    description: str
    scores: Mapping[str, np.ndarray]
    guesses: Mapping[str, np.ndarray]
    stands_alone: bool
    parameters: int
    bytes: int
    seconds: float | None
    tokens: int | None
    tokens_per_second: float
    choices: tuple[Mapping[str, float], ...] = ()
    gives_zeros: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_correct: Mapping[str, np.ndarray] | None = None
    entropies: Mapping[str, np.ndarray] | None = None
    weights: GivenWeights | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How the arms are compared."""

    tuning: str
    """the split on which λ is chosen"""
    tests: tuple[str, ...]
    """the first is the test split, the others are further test sets"""
    num_bytes: Mapping[str, int]
    """split → UTF-8 bytes of its text"""
    grid: Grid
    """of λ, from which the best is chosen"""
    bootstrap_samples: int
    bootstrap_block: int
    subject: str | None
    """the arm to which each of the others is compared, besides the base; None: there is none"""
    reference: str | None
    """the arm by whose gain the subject's is measured; None: there is none"""
    controls: tuple[str, ...] = ()
    """arms that the subject should be better than"""
    document_starts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """split → its first position of each document, for intervals that draw whole documents again"""
    choices: Mapping[str, ArmFigures] | None = None
    """arm → its figures in another report, whose λ, neighbours and temperature are taken; None: they are
    chosen on the tuning split"""
    choices_from: str | None = None
    """that report's directory"""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of an evaluation; see `formats.evaluation.Evaluation` for each."""

    arms: tuple[ArmFigures, ...]
    recovered_share: float | None
    against: Mapping[str, Change]
    wins: Mapping[str, bool]
    breakdowns: tuple[Breakdown, ...]
    scores: Mapping[str, Mapping[str, np.ndarray]]
    """arm → split → log-probabilities of the values, float64 [N], at what was chosen"""


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What was chosen for an arm on the tuning split."""

    lmbda: float | None
    column: int | None
    chosen: Mapping[str, float]
    curve: tuple[CurvePoint, ...] | None


def summarize(arms: Sequence[ArmScores], comparison: Comparison, groups: Sequence[Groups] = ()) -> Summary:
    """All figures: λ, and what else an arm leaves open, are chosen on the tuning split; the rest follows.

    Args:
        arms: the first is the base.
        comparison: how they are compared.
        groups: ways to part the positions of the first test split.
    """
    base, test = arms[0], comparison.tests[0]
    figures, final_scores = [], {}
    for arm in arms:
        choice = _choose(base, arm, comparison)
        final_scores[arm.name] = final = _final_scores(arm, choice, arm.scores, base.scores)
        figures.append(_figures(base, arm, choice, final, comparison))
    return Summary(
        arms=tuple(figures),
        recovered_share=_recovered_share(figures, comparison),
        against=_against(final_scores, comparison),
        wins=_wins(figures, comparison),
        breakdowns=tuple(_breakdown(way, base.name, final_scores, test) for way in groups),
        scores=final_scores,
    )


def _choose(base: ArmScores, arm: ArmScores, comparison: Comparison) -> _Choice:
    """The λ and column of the lowest perplexity on the tuning split, or those of another report; and that
    column's curve over λ."""
    if arm.stands_alone:
        return _Choice(lmbda=None, column=None, chosen={}, curve=None)
    if arm.weights is not None:
        chosen = arm.weights.chosen
        lmbda = share_of_all(chosen.values()) if chosen else None
        return _Choice(lmbda=lmbda, column=None, chosen=chosen, curve=None)
    base_N, scores_NT = base.scores[comparison.tuning], arm.scores[comparison.tuning]
    grid_G = np.array(comparison.grid.lambdas)
    # Tokens without any probability: such an arm is no language model by itself.
    is_allowed_G = grid_G < 1 if arm.gives_zeros else np.ones(len(grid_G), dtype=bool)
    columns = scores_NT[:, None] if scores_NT.ndim == 1 else scores_NT
    curves_TG = np.array(
        [lambda_curve(base_N, columns[:, t], comparison.grid) for t in range(columns.shape[1])]
    )
    if comparison.choices is None:
        best = int(np.argmin(np.where(is_allowed_G, curves_TG, np.inf)))
        t, g = divmod(best, len(grid_G))
        lmbda = float(grid_G[g])
    else:
        given = comparison.choices[arm.name]
        assert given.lmbda is not None
        t = arm.choices.index(given.chosen) if arm.choices else 0
        lmbda = given.lmbda
    curve = tuple(
        CurvePoint(lmbda=float(weight), ppl=float(ppl) if np.isfinite(ppl) else None)
        for weight, ppl in zip(grid_G, curves_TG[t], strict=True)
    )
    return _Choice(
        lmbda=lmbda,
        column=t if scores_NT.ndim == 2 else None,
        chosen=arm.choices[t] if arm.choices else {},
        curve=curve,
    )


def _column(scores: np.ndarray, choice: _Choice) -> np.ndarray:
    """The chosen column, [N]."""
    return scores if choice.column is None else scores[:, choice.column]


def _final_scores(
    arm: ArmScores,
    choice: _Choice,
    scores_of_arm: Mapping[str, np.ndarray],
    scores_of_base: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Split → log-probabilities [N] at the chosen λ and column, float64."""
    if arm.weights is not None:
        lambdas = arm.weights.lambdas
        return {
            split: mixed_scores(scores_of_base[split], scores_N, lambdas[split])
            for split, scores_N in scores_of_arm.items()
        }
    if choice.lmbda is None:
        return {split: scores.astype(np.float64) for split, scores in scores_of_arm.items()}
    return {
        split: mixed_scores(base_N, _column(scores_of_arm[split], choice), choice.lmbda)
        for split, base_N in scores_of_base.items()
    }


def _figures(
    base: ArmScores,
    arm: ArmScores,
    choice: _Choice,
    final: Mapping[str, np.ndarray],
    comparison: Comparison,
) -> ArmFigures:
    splits = {
        split: _split_figures(base, arm, choice, final[split], split, comparison)
        for split in (comparison.tuning, *comparison.tests)
    }
    test = splits[comparison.tests[0]]
    return ArmFigures(
        name=arm.name,
        description=arm.description,
        ppl=test.ppl,
        bits_per_byte=test.bits_per_byte,
        ppl_change=test.ppl_change,
        ppl_interval=test.ppl_interval,
        win_rate=test.win_rate,
        splits=splits,
        lmbda=choice.lmbda,
        chosen=choice.chosen,
        tried={
            name: tuple(sorted({values[name] for values in arm.choices}))
            for name in (arm.choices[0] if arm.choices else ())
        },
        parameters=arm.parameters,
        bytes=arm.bytes,
        tokens=arm.tokens,
        seconds=arm.seconds,
        tokens_per_second=arm.tokens_per_second,
        calibration=_calibration(base, arm, choice, comparison.tests[0]),
        tuning_curve=choice.curve,
        weights=None if arm.weights is None else arm.weights.figures,
        settings=arm.settings,
    )


def _split_figures(
    base: ArmScores,
    arm: ArmScores,
    choice: _Choice,
    final_N: np.ndarray,
    split: str,
    comparison: Comparison,
) -> SplitFigures:
    """One arm on one split; the change and its interval are against the base."""
    base_N = base.scores[split]
    change = None if arm is base else _change(base_N, final_N, split, comparison)
    return SplitFigures(
        ppl=perplexity(final_N),
        bits_per_byte=bits_per_byte(final_N, comparison.num_bytes[split]),
        ppl_change=None if change is None else change.ppl_change,
        ppl_interval=None if change is None else change.ppl_interval,
        document_interval=None if change is None else change.document_interval,
        win_rate=None if arm is base else win_rate(base_N, _column(arm.scores[split], choice)),
    )


def _calibration(base: ArmScores, arm: ArmScores, choice: _Choice, split: str) -> Calibration:
    """How well the probability of the guess (the base's likeliest token, where the arm is mixed with the
    base) agrees with how often it is right."""
    is_correct = arm.is_correct if arm.stands_alone else base.is_correct
    assert is_correct is not None
    guesses = _final_scores(arm, choice, {split: arm.guesses[split]}, {split: base.guesses[split]})
    return calibration(guesses[split], is_correct[split])


def _breakdown(
    groups: Groups, base: str, final_scores: Mapping[str, Mapping[str, np.ndarray]], split: str
) -> Breakdown:
    arms = {name: scores[split] for name, scores in final_scores.items() if name != base}
    return breakdown(groups, final_scores[base][split], arms)


def _change(before_N: np.ndarray, after_N: np.ndarray, split: str, comparison: Comparison) -> Change:
    """The relative change of perplexity, negative where `after` is better, and its 95 % intervals."""
    num_resamples = comparison.bootstrap_samples
    interval = bootstrap_interval(
        before_N, after_N, block=comparison.bootstrap_block, num_resamples=num_resamples
    )
    starts = comparison.document_starts.get(split, ())
    by_document = (
        bootstrap_interval(before_N, after_N, starts=np.asarray(starts), num_resamples=num_resamples)
        if len(starts) >= _MIN_DOCUMENTS
        else None
    )
    return Change(
        ppl_change=perplexity(after_N) / perplexity(before_N) - 1,
        ppl_interval=interval,
        document_interval=by_document,
    )


def _recovered_share(arms: Sequence[ArmFigures], comparison: Comparison) -> float | None:
    """The subject's gain in test perplexity as a share of the reference's; None without both, or without a
    gain."""
    if comparison.subject is None or comparison.reference is None:
        return None
    ppl = {arm.name: arm.ppl for arm in arms}
    base, reference, subject = arms[0].ppl, ppl[comparison.reference], ppl[comparison.subject]
    return (base - subject) / (base - reference) if base > reference else None


def _against(
    final_scores: Mapping[str, Mapping[str, np.ndarray]], comparison: Comparison
) -> dict[str, Change]:
    """Arm → the change of test perplexity from that arm to the subject, paired."""
    subject, test = comparison.subject, comparison.tests[0]
    if subject is None:
        return {}
    return {
        name: _change(scores[test], final_scores[subject][test], test, comparison)
        for name, scores in final_scores.items()
        if name != subject
    }


def _wins(arms: Sequence[ArmFigures], comparison: Comparison) -> dict[str, bool]:
    """Control → whether the subject has the lower test perplexity."""
    if comparison.subject is None:
        return {}
    ppl = {arm.name: arm.ppl for arm in arms}
    return {name: ppl[comparison.subject] < ppl[name] for name in comparison.controls}
