"""Part of `quality`: intervals over documents and over seeds, from each document's sum of log-probabilities.

A figure is a function of perplexities: a change, or a ratio of gains. Within a seed it is computed again for
2,000 draws of whole documents with replacement, the same documents for every arm (paired); the 2.5 and 97.5
percentiles are that seed's interval. The interval that is reported holds those of all seeds, from the lowest
end to the highest: it covers both what other documents would change and what the trainings differed by. With
few seeds this is wider than a pooled bootstrap, which would take three trainings for all that can happen.

M documents, R draws, S seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NUM_DRAWS = 2000
Array = np.ndarray
Figure = Callable[[Callable[[str], Array]], Array]
"""from perplexities by the name of an arm (arrays over draws) to one number a draw"""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure over the seeds; NaN where it has no value."""

    value: float
    """the mean of the seeds' own"""
    interval: tuple[float, float]
    """of the draws that have a value"""
    by_seed: tuple[float, ...]
    undefined: float
    """share of the draws without a value, of the seed that has most"""


@dataclass(frozen=True, kw_only=True)
class ArmSums:
    """The arms of one text: what each spent on each document, by seed; one entry where no seed changes it."""

    positions_M: Array
    sums: Mapping[str, Sequence[Array]]
    """arm → seed → natural log-probabilities summed by document, float64 [M]"""

    @property
    def num_seeds(self) -> int:
        return max(len(by_seed) for by_seed in self.sums.values())

    def seed_sums(self, arm: str, seed: int) -> Array:
        by_seed = self.sums[arm]
        return by_seed[seed] if len(by_seed) > 1 else by_seed[0]

    def ppl(self, arm: str, seed: int) -> float:
        return float(np.exp(-self.seed_sums(arm, seed).sum() / self.positions_M.sum()))


def estimate(tested: ArmSums, figure: Figure, arms: Sequence[str]) -> Estimate:
    """A figure of these arms with its interval.

    Args:
        tested: the arms' sums.
        figure: reads the perplexities of `arms` alone.
        arms: those that it reads; where each has one entry, there is one seed.
    """
    num_seeds = max(len(tested.sums[arm]) for arm in arms)
    counts_RM = draw_documents(len(tested.positions_M), NUM_DRAWS)
    values, ends, undefined = [], [], []
    for seed in range(num_seeds):
        exact = {arm: np.array([tested.ppl(arm, seed)]) for arm in arms}
        drawn = {arm: _drawn_ppl(tested, arm, seed, counts_RM) for arm in arms}
        values.append(float(figure(exact.__getitem__)[0]))
        values_R = figure(drawn.__getitem__)
        undefined.append(float(np.isnan(values_R).mean()))
        ends.append(_quantiles(values_R[~np.isnan(values_R)]))
    return Estimate(
        value=float(np.mean(values)),
        interval=hull(ends),
        by_seed=tuple(values),
        undefined=max(undefined),
    )


def hull(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """From the lowest end to the highest."""
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def _quantiles(values: Array) -> tuple[float, float]:
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def draw_documents(num_documents: int, num_draws: int) -> Array:
    """How often each document is drawn with replacement, float64 [R, M]; the same in every call."""
    generator = np.random.default_rng(0)
    shares_M = np.full(num_documents, 1 / num_documents)
    return generator.multinomial(num_documents, shares_M, size=num_draws).astype(np.float64)


def _drawn_ppl(tested: ArmSums, arm: str, seed: int, counts_RM: Array) -> Array:
    sums_R = counts_RM @ tested.seed_sums(arm, seed)
    ppl_R: Array = np.exp(-sums_R / (counts_RM @ tested.positions_M))
    return ppl_R
