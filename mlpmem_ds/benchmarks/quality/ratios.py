"""Part of `quality`: the ratios that say whether the memory is worth its parameters, each with its goal.

A gain is perplexity of the base less perplexity of the arm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlpmem_ds.benchmarks.quality.arms import (
    BANK,
    BASE,
    CONTINUED,
    ENSEMBLE_GATE,
    GATE,
    KNN,
    MEMORY,
    MEMORY_CE,
    PAPER,
    PAPER_CE,
)
from mlpmem_ds.benchmarks.quality.bootstrap import ArmSums, Array, estimate
from mlpmem_ds.benchmarks.quality.results import Interval, RatioResult

Ppl = Callable[[str], Array]
_MAX_UNDEFINED = 0.025  # of the draws: with more, the end of the interval may be anywhere


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One ratio: what is computed of which arms, on which text, and what it should be."""

    name: str
    figure: Callable[[Ppl], Array]
    arms: tuple[str, ...]
    """that the figure reads; without one of them the ratio is left out"""
    goal: float
    direction: Literal["at least", "at most"]
    meaning: str
    """for the page"""
    is_of_other: bool = False
    """whether it is taken on the other text than that of the training"""

    def result(self, tested: ArmSums, text: str) -> RatioResult | None:
        """None where an arm is missing."""
        if not all(arm in tested.sums for arm in self.arms):
            return None
        found = estimate(tested, self.figure, self.arms)
        has_value = not np.isnan([found.value, *found.interval]).any()
        return self.judged(
            text,
            value=found.value if has_value else None,
            interval=found.interval if has_value else None,
            by_seed=[None if np.isnan(value) else value for value in found.by_seed],
            is_defined=found.undefined <= _MAX_UNDEFINED,
        )

    def judged(
        self,
        text: str,
        *,
        value: float | None,
        interval: Interval | None,
        by_seed: Sequence[float | None],
        is_defined: bool,
    ) -> RatioResult:
        """The ratio with this value, compared with its goal; `is_defined`: nearly every draw has one."""
        has_value = value is not None and interval is not None
        meets = [self._meets(one) for one in (value, *(interval or ())) if one is not None]
        return RatioResult(
            name=self.name,
            text=text,
            value=value,
            interval=interval,
            by_seed=tuple(by_seed),
            goal=f"{self.direction} {self.goal:g}",
            is_met=has_value and meets[0],
            is_clear=has_value and len(set(meets)) == 1 and is_defined,
            meaning=self.meaning,
        )

    def _meets(self, value: float) -> bool:
        return value >= self.goal if self.direction == "at least" else value <= self.goal


def gain_share(ppl: Ppl, arm: str, of: str) -> Array:
    """Gain of an arm as a share of that of another; NaN where the other gains nothing."""
    gain, reference = ppl(BASE) - ppl(arm), ppl(BASE) - ppl(of)
    shares: Array = np.where(reference > 0, gain / np.where(reference > 0, reference, 1.0), np.nan)
    return shares


def _quotient(arm: str, of: str) -> Callable[[Ppl], Array]:
    return lambda ppl: ppl(arm) / ppl(of)


def _share(arm: str, of: str) -> Callable[[Ppl], Array]:
    return lambda ppl: gain_share(ppl, arm, of)


RATIOS: tuple[Ratio, ...] = (
    Ratio(
        name="recovered_share",
        figure=_share(MEMORY, KNN),
        arms=(BASE, MEMORY, KNN),
        goal=1.0,
        direction="at least",
        meaning="gain of the memory ÷ gain of exact kNN-LM (k, T, λ tuned)",
    ),
    Ratio(
        name="memory_gain_over_ce_only_gain",
        figure=_share(PAPER, PAPER_CE),
        arms=(BASE, PAPER, PAPER_CE),
        goal=1.0,
        direction="at least",
        meaning="published recipe: gain of the memory ÷ gain without the retriever",
    ),
    Ratio(
        name="default_recipe_gain_over_ce_only_gain",
        figure=_share(MEMORY, MEMORY_CE),
        arms=(BASE, MEMORY, MEMORY_CE),
        goal=1.0,
        direction="at least",
        meaning="recommended recipe: gain of the memory ÷ gain without the retriever",
    ),
    Ratio(
        name="gate_ppl_over_best_fixed",
        figure=_quotient(GATE, MEMORY),
        arms=(GATE, MEMORY),
        goal=0.99,
        direction="at most",
        meaning="perplexity with the gate ÷ with the best fixed λ",
    ),
    Ratio(
        name="gate_share_of_new_domain_gain",
        figure=_share(GATE, MEMORY),
        arms=(BASE, GATE, MEMORY),
        goal=1.0,
        direction="at least",
        meaning="gain with the gate ÷ with the best fixed λ",
    ),
    Ratio(
        name="gate_out_of_domain_ppl_over_base",
        figure=_quotient(GATE, BASE),
        arms=(GATE, BASE),
        goal=1.005,
        direction="at most",
        meaning="perplexity of the other text with the gate ÷ of the base alone",
        is_of_other=True,
    ),
    Ratio(
        name="memory_ppl_over_continued_training",
        figure=_quotient(GATE, CONTINUED),
        arms=(GATE, CONTINUED),
        goal=1.0,
        direction="at most",
        meaning="perplexity with the gated memory ÷ of the fine-tuned base",
    ),
    Ratio(
        name="memory_ppl_over_gated_ensemble",
        figure=_quotient(GATE, ENSEMBLE_GATE),
        arms=(GATE, ENSEMBLE_GATE),
        goal=1.0,
        direction="at most",
        meaning="perplexity with the gated memory ÷ with a second model gated alike",
    ),
    Ratio(
        name="memory_out_of_domain_ppl_over_gated_ensemble",
        figure=_quotient(GATE, ENSEMBLE_GATE),
        arms=(GATE, ENSEMBLE_GATE),
        goal=1.0,
        direction="at most",
        meaning="perplexity of the other text with the gated memory ÷ with a second model gated alike",
        is_of_other=True,
    ),
    Ratio(
        name="bank_share_of_own_gain",
        figure=_share(BANK, GATE),
        arms=(BASE, BANK, GATE),
        goal=0.95,
        direction="at least",
        meaning="gain of the bank of both memories ÷ gain of the text's own memory with a gate",
    ),
)


def ratios_of(own: ArmSums, other: ArmSums | None, text: str) -> list[RatioResult]:
    """All ratios of one text that its arms allow.

    Args:
        own: the arms on the text that they were trained on.
        other: the same on the other text; None where they were not tested there.
        text: the first one's name.
    """
    found = []
    for ratio in RATIOS:
        tested = other if ratio.is_of_other else own
        result = None if tested is None else ratio.result(tested, text)
        if result is not None:
            found.append(result)
    return found
