"""Last stage, second half: log-probabilities of the arms → the numbers that the page and the plots show.

An *arm* is one way to predict: a model alone (`base`, a control), or the base mixed with something else, with
weight λ. Nothing here runs a model: every number comes from log-probabilities of positions, two a position
and arm, so that any λ, temperature or split costs nothing. Used by `evaluate`; natural logarithms, float64.

N = positions of a split, T = choices of a kNN (temperature and neighbours), G = grid of λ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlpmem_ds.maths.scores import bits_per_byte, bootstrap_interval, perplexity, win_rate
from mlpmem_ds.models.mixture import Grid
from mlpmem_ds.models.mixture_scores import lambda_curve, mixed_scores
from mlpmem_ds.stages.report.breakdowns import Groups, breakdown, calibration

BASE, KNN_EXACT, KNN_IVFPQ, MEMORY = "base", "base+knn_exact", "base+knn_ivfpq", "base+memory"
BYTES_NOTE = "bytes on disk that the arm reads: weights and configuration; keys, values and index for kNN"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to predict, and its price.

    `scores` holds for each split the natural log-probabilities of the values: [N], or [N, T] where a
    temperature and a number of neighbours are still to be chosen: column t has `temperatures[t]` and
    `neighbours[t]`. `alone`: they are the arm's own; else they are mixed with the base's. `seconds` is what
    making the arm took beyond the base, `tokens` what it read for that, each time that it read them; None
    where it is not known.

    `guesses`, for the calibration: the log-probability given to one token a position, as `scores` is shaped.
    The token is the arm's own likeliest where it is alone, and `came` says where it was the value; else it is
    the base's likeliest. `entropies` [N], in nats, of an arm that is alone. None where they were not stored.
    """

    name: str
    scores: Mapping[str, np.ndarray]
    alone: bool
    parameters: int
    bytes: int
    seconds: float | None
    tokens_per_second: float | None
    tokens: int | None = None
    temperatures: tuple[float, ...] = ()
    neighbours: tuple[int, ...] = ()
    guesses: Mapping[str, np.ndarray] | None = None
    came: Mapping[str, np.ndarray] | None = None
    entropies: Mapping[str, np.ndarray] | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How the arms are compared."""

    tuning: str
    tests: tuple[str, ...]  # the first is the test split, the others are further test sets
    num_bytes: Mapping[str, int]  # split → UTF-8 bytes of its text
    lambdas: tuple[float, ...]
    bootstrap_samples: int
    bootstrap_block: int


def summarize(arms: Sequence[Arm], protocol: Protocol, groups: Sequence[Groups] = ()) -> dict[str, Any]:
    """The numbers of eval.json: λ, and for kNN temperature and neighbours, are chosen on the tuning split;
    the rest follows.

    Args:
        arms: the first is the base.
        groups: ways to part the positions of the first test split.
    """
    base = arms[0]
    rows, final_scores = [], {}
    for arm in arms:
        choice = _choose(base, arm, protocol)
        final = _final_scores(base, arm, choice, arm.scores, base.scores)
        final_scores[arm.name] = final
        splits = {
            split: _split_numbers(base, final, arm, choice, split, protocol)
            for split in (protocol.tuning, *protocol.tests)
        }
        rows.append(
            {
                "name": arm.name,
                **splits[protocol.tests[0]],
                "splits": splits,
                "lambda": choice["lambda"],
                "temperature": choice["temperature"],
                "neighbours": choice["neighbours"],
                "parameters": arm.parameters,
                "bytes": arm.bytes,
                "tokens": arm.tokens,
                "seconds": arm.seconds,
                "tokens_per_second": arm.tokens_per_second,
                "calibration": _calibration(base, arm, choice, protocol.tests[0]),
                "tuning_curve": choice["curve"],
            }
        )
    return {
        "arms": rows,
        "recovered_share": _recovered_share(rows),
        "against": _against(final_scores, protocol),
        "breakdowns": [_breakdown(way, base.name, final_scores, protocol.tests[0]) for way in groups],
        "wins": {
            arm.name: bool(_ppl(rows, MEMORY) < _ppl(rows, arm.name))
            for arm in arms
            if MEMORY in final_scores and arm.name not in (BASE, KNN_EXACT, KNN_IVFPQ, MEMORY)
        },
    }


def _choose(base: Arm, arm: Arm, protocol: Protocol) -> dict[str, Any]:
    """The λ and column of the least perplexity on the tuning split, and that column's curve over λ."""
    if arm.alone:
        return {"lambda": None, "temperature": None, "neighbours": None, "column": None, "curve": None}
    base_N, other_NT = base.scores[protocol.tuning], arm.scores[protocol.tuning]
    grid_G = np.array(protocol.lambdas)
    # kNN gives most tokens no probability at all: alone it is no language model, so λ = 1 is not among its
    # choices.
    allowed_G = grid_G < 1 if arm.temperatures else np.ones(len(grid_G), dtype=bool)
    columns = other_NT[:, None] if other_NT.ndim == 1 else other_NT
    grid = Grid(protocol.lambdas)
    curves_TG = np.array([lambda_curve(base_N, columns[:, t], grid) for t in range(columns.shape[1])])
    t, g = np.unravel_index(np.argmin(np.where(allowed_G, curves_TG, np.inf)), curves_TG.shape)
    curve = [
        {"lambda": float(lmbda), "ppl": float(ppl) if np.isfinite(ppl) else None}
        for lmbda, ppl in zip(grid_G, curves_TG[t], strict=True)
    ]
    return {
        "lambda": float(grid_G[g]),
        "temperature": arm.temperatures[t] if arm.temperatures else None,
        "neighbours": arm.neighbours[t] if arm.neighbours else None,
        "column": int(t) if arm.temperatures else None,
        "curve": curve,
    }


def _other(scores: np.ndarray, choice: Mapping[str, Any]) -> np.ndarray:
    """What is mixed with the base, [N], in the chosen column."""
    return scores if choice["column"] is None else scores[:, choice["column"]]


def _final_scores(
    base: Arm,
    arm: Arm,
    choice: Mapping[str, Any],
    of_arm: Mapping[str, np.ndarray],
    of_base: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Split → log-probabilities [N] of the arm at the chosen λ and column, from its own part's and the
    base's."""
    if arm.alone:
        return {split: scores.astype(np.float64) for split, scores in of_arm.items()}
    return {
        split: mixed_scores(base_N, _other(of_arm[split], choice), choice["lambda"])
        for split, base_N in of_base.items()
    }


def _calibration(base: Arm, arm: Arm, choice: Mapping[str, Any], split: str) -> dict[str, Any] | None:
    """How well the probability of the likeliest token (the base's, where the arm stands on the base) matches
    its truth."""
    came = arm.came if arm.alone else base.came
    if arm.guesses is None or base.guesses is None or came is None:
        return None
    guesses = _final_scores(base, arm, choice, {split: arm.guesses[split]}, {split: base.guesses[split]})
    return calibration(guesses[split], came[split])


def _breakdown(
    groups: Groups, base: str, final_scores: Mapping[str, Mapping[str, np.ndarray]], split: str
) -> dict[str, Any]:
    others = {name: scores[split] for name, scores in final_scores.items() if name != base}
    return breakdown(groups, final_scores[base][split], others)


def _split_numbers(
    base: Arm,
    final: Mapping[str, np.ndarray],
    arm: Arm,
    choice: Mapping[str, Any],
    split: str,
    protocol: Protocol,
) -> dict[str, Any]:
    """One arm on one split; the change and its interval are against the base."""
    base_N, arm_N = base.scores[split], final[split]
    numbers: dict[str, Any] = {
        "ppl": perplexity(arm_N),
        "bits_per_byte": bits_per_byte(arm_N, protocol.num_bytes[split]),
    }
    if arm is base:
        return {**numbers, "ppl_change": None, "ppl_interval": None, "win_rate": None}
    return {
        **numbers,
        **_change(base_N, arm_N, protocol),
        "win_rate": win_rate(base_N, _other(arm.scores[split], choice)),
    }


def _change(before_N: np.ndarray, after_N: np.ndarray, protocol: Protocol) -> dict[str, Any]:
    """The relative change of perplexity, negative where `after` is better, and its 95 % interval."""
    interval = bootstrap_interval(
        before_N, after_N, block=protocol.bootstrap_block, num_resamples=protocol.bootstrap_samples
    )
    return {"ppl_change": perplexity(after_N) / perplexity(before_N) - 1, "ppl_interval": list(interval)}


def _ppl(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return next((row["ppl"] for row in rows if row["name"] == name), float("nan"))


def _recovered_share(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of the exact kNN's gain in test perplexity that the memory gives; None without both, or without a
    gain."""
    base, knn, memory = (_ppl(rows, name) for name in (BASE, KNN_EXACT, MEMORY))
    return (base - memory) / (base - knn) if base > knn and np.isfinite(memory) else None


def _against(final_scores: Mapping[str, Mapping[str, np.ndarray]], protocol: Protocol) -> dict[str, Any]:
    """Arm → the change of test perplexity from that arm to base+memory, paired."""
    if MEMORY not in final_scores:
        return {}
    test = protocol.tests[0]
    return {
        name: _change(scores[test], final_scores[MEMORY][test], protocol)
        for name, scores in final_scores.items()
        if name != MEMORY
    }
