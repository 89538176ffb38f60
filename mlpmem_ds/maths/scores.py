"""Pipeline: two log-probabilities a position (base's and memory's, or kNN's) → **scores** → the report's
table.

Natural logarithms, float64. Scores of a mixture of two are in `models/mixture_scores.py`.

Shape legend: N positions, B blocks, R resamples.
"""

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]


def perplexity(log_probabilities_N: Array) -> float:
    """exp of the mean negative log-probability; infinite if one position has probability 0."""
    return float(perplexity_of(_float64(log_probabilities_N).mean()))


def perplexity_of(means: Array | float) -> Array:
    """exp of the negative of mean log-probabilities; infinite beyond float64, from 710 nats on."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(-np.asarray(means, dtype=np.float64)))


def bits_per_byte(log_probabilities_N: Array, num_bytes: int) -> float:
    """Bits spent on the positions, by byte of the text they cover. Raises ValueError for an empty text."""
    if num_bytes < 1:
        raise ValueError(f"the text has {num_bytes} bytes; bits per byte need at least 1")
    return float(-_float64(log_probabilities_N).sum() / np.log(2.0) / num_bytes)


def bootstrap_interval(
    log_a_N: Array,
    log_b_N: Array,
    *,
    block: int = 512,
    starts: Array | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of the relative perplexity change of b against a, ``ppl_b / ppl_a - 1``, by a paired
    block bootstrap.

    The positions are cut into contiguous blocks of ``block`` (the last may be shorter), or where ``starts``
    says (rising, from 0: of documents), since neighbouring positions of a text are not independent. Each
    resample draws as many blocks as there are, with replacement, the same for a and b, and gives
    exp(mean(log a) - mean(log b)) - 1 over its positions; the interval is the 2.5 and 97.5 percentiles. All
    positions must have a positive probability under both. Raises ValueError for fewer than 2 blocks.
    """
    _check_pair(log_a_N, log_b_N)
    differences_N = _float64(log_a_N) - _float64(log_b_N)
    starts_B = np.arange(0, len(differences_N), block) if starts is None else starts
    if len(starts_B) < 2:
        raise ValueError(
            f"{len(differences_N)} positions make {len(starts_B)} blocks{f' of {block}' * (starts is None)};"
            " a bootstrap needs 2 or more"
        )
    if not np.isfinite(differences_N).all():
        raise ValueError(
            "a position has probability 0, so a perplexity is infinite; mix it with the base first"
        )
    sums_B = np.add.reduceat(differences_N, starts_B)
    sizes_B = np.diff(np.append(starts_B, len(differences_N)))
    generator = np.random.default_rng(seed)
    changes_R = np.empty(num_resamples)
    for resample in range(num_resamples):
        drawn_B = generator.integers(len(starts_B), size=len(starts_B))
        changes_R[resample] = np.expm1(sums_B[drawn_B].sum() / sizes_B[drawn_B].sum())
    low, high = np.quantile(changes_R, [0.025, 0.975])
    return float(low), float(high)


def win_rate(log_a_N: Array, log_b_N: Array) -> float:
    """Share of the positions to which b gives more probability than a; a tie counts one half."""
    _check_pair(log_a_N, log_b_N)
    a_N, b_N = _float64(log_a_N), _float64(log_b_N)
    return float(((b_N > a_N) + 0.5 * (b_N == a_N)).mean())


def reliability(probabilities_N: Array, outcomes_N: Array, num_bins: int = 15) -> tuple[Array, Array, Array]:
    """Bins of equal width over [0, 1]: positions [B], mean probability [B] and share of true outcomes [B] (0
    where empty).

    ``probabilities_N`` are those given to an event at each position, ``outcomes_N`` whether it happened.
    Raises ValueError for probabilities outside [0, 1].
    """
    _check_pair(probabilities_N, outcomes_N)
    probabilities_N = _float64(probabilities_N)
    if not ((probabilities_N >= 0) & (probabilities_N <= 1 + 1e-6)).all():
        raise ValueError(
            f"probabilities between {probabilities_N.min()} and {probabilities_N.max()}; they must lie in"
            " [0, 1]"
        )
    bins_N = np.minimum((probabilities_N * num_bins).astype(np.int64), num_bins - 1)
    counts_B = np.bincount(bins_N, minlength=num_bins)
    sums = (
        np.bincount(bins_N, weights=values, minlength=num_bins)
        for values in (probabilities_N, _float64(outcomes_N))
    )
    means_B, shares_B = (sums_B / np.maximum(counts_B, 1) for sums_B in sums)
    return counts_B, means_B, shares_B


def calibration_error(probabilities_N: Array, outcomes_N: Array, num_bins: int = 15) -> float:
    """Expected calibration error: mean over the positions of |mean probability - share of true outcomes| of
    their bin."""
    counts_B, means_B, shares_B = reliability(probabilities_N, outcomes_N, num_bins)
    return float((counts_B * np.abs(means_B - shares_B)).sum() / counts_B.sum())


def _check_pair(log_a_N: Array, log_b_N: Array) -> None:
    if len(log_a_N) != len(log_b_N) or not len(log_a_N):
        raise ValueError(
            f"{len(log_a_N)} and {len(log_b_N)} log-probabilities; both need the same positions, at least 1"
        )


def _float64(array: Array) -> Array:
    return np.asarray(array, dtype=np.float64)
