"""Pipeline: distances of neighbours → **their weights** → targets. How much each neighbour counts, as a value
that travels with the targets.

Every weighting is a kernel of the *excess* s = d² - d₁² of a neighbour's squared distance over that of the
row's nearest, divided by a temperature T in the same units, and normalized over the row:

- ``softmax``: ``exp(-s / T)``. In the quotient of the normalization d₁² cancels, so these are the weights
  exp(-d²/T) of kNN-LM (arXiv 1911.00172, eq. 2) and MLP Memory (arXiv 2508.01832).
- ``inverse-distance``: ``1 / (1 + s / T)``, in proportion to 1 / (s + T): Shepard's interpolation by inverse
  distances (1968, power 2), with the T of the Student kernel of t-SNE (van der Maaten and Hinton 2008, eq. 4)
  in place of its pole. Far neighbours keep more weight than with softmax. It is taken of s and not of d²,
  unlike Shepard's: the k nearest keys of many dimensions are almost equally far, so 1 / d² alone would weigh
  them almost equally, and no T would make few of them count.

All in float64, and every sum runs in the order of its row: a row's weights do not depend on other rows.
(Across kinds of processor `exp` may differ in the last bit.)

Shape legend: Q queries (rows), K neighbours a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from mlpmem_ds.core.blocks import split_blocks

Array: TypeAlias = np.ndarray[Any, Any]

Kind = Literal["softmax", "inverse-distance"]

_KERNELS: dict[Kind, Callable[[Array], Array]] = {  # of s / T, in place; infinity has no weight
    "softmax": lambda excess_QK: np.exp(np.negative(excess_QK, out=excess_QK), out=excess_QK),
    "inverse-distance": lambda excess_QK: np.reciprocal(np.add(excess_QK, 1.0, out=excess_QK), out=excess_QK),
}

DEFAULT_PERPLEXITY = 100.0
"""neighbours that count where no number was given, if k allows it"""
_BISECTIONS = 60
_WEIGHTS_AT_ONCE = 1 << 18  # in a fit: they stay in the cache (30,000 neighbours: half the time)
_MARGIN = 1e-9


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """How neighbours are weighted.

    Attributes:
        kind: the kernel, see the module.
        temperature: its scale, in units of squared key distance, above 0.
    """

    kind: Kind = "softmax"
    temperature: float

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; it divides squared distances and must be above 0"
            )

    def weights(self, squared_QK: Array, valid_QK: Array) -> Array:
        """Weights of the valid neighbours of each row, float64 [Q, K], of sum 1; all zero where a row has
        none."""
        return _normalized(self.kind, _excess(squared_QK, valid_QK), self.temperature)

    def scaled(self, factor: float) -> Weighting:
        """The same kind at `factor` times the temperature."""
        return replace(self, temperature=self.temperature * factor)


def default_perplexity(k: int) -> float:
    """The weight perplexity for k neighbours, at least 2, where none was asked for."""
    return min(DEFAULT_PERPLEXITY, max(k / 2, 1.5))


def weight_perplexity(weights_QK: Array) -> Array:
    """exp(entropy) of each row's weights, [Q]: how many neighbours count, 1 to K (1 for a row without
    neighbour)."""
    logarithms_QK = np.log(weights_QK, out=np.zeros(weights_QK.shape), where=weights_QK > 0)
    return np.exp(-row_sums(weights_QK * logarithms_QK))


def fit_weighting(kind: Kind, squared_QK: Array, valid_QK: Array, perplexity: float) -> Weighting:
    """The weighting of this kind at which the rows' mean log weight perplexity is log(``perplexity``); rows
    without neighbour do not count.

    Bisection on log T, the same bits each time. Raises ValueError when no temperature reaches the perplexity:
    it must lie between what the nearest neighbours' ties give (T → 0) and the number of neighbours (T → ∞),
    means over rows in the log.
    """
    has_neighbour_Q = valid_QK.any(axis=1)
    if not has_neighbour_Q.any():
        raise ValueError(
            "no row has a neighbour, so no temperature can be fitted; exclude less or search more lists"
        )
    excess_QK = _excess(squared_QK[has_neighbour_Q], valid_QK[has_neighbour_Q])
    lowest = float(np.exp(np.log((excess_QK == 0).sum(axis=1)).mean()))
    highest = float(np.exp(np.log(np.isfinite(excess_QK).sum(axis=1)).mean()))
    if not lowest * (1 + _MARGIN) < perplexity < highest * (1 - _MARGIN):
        raise ValueError(
            f"perplexity {perplexity:g} cannot be reached: the nearest neighbours alone give {lowest:g}, all"
            f" of them {highest:g}; choose one between, or raise k"
        )

    blocks = split_blocks(len(excess_QK), max(1, _WEIGHTS_AT_ONCE // excess_QK.shape[1]))

    def is_too_hot(log_temperature: float) -> bool:
        temperature = float(np.exp(log_temperature))
        perplexities = [
            weight_perplexity(_normalized(kind, excess_QK[slice(*block)], temperature)) for block in blocks
        ]
        return float(np.log(np.concatenate(perplexities)).mean()) > np.log(perplexity)

    low = high = float(np.log(excess_QK[np.isfinite(excess_QK)].max()))
    while is_too_hot(low):
        low -= 4.0
    while not is_too_hot(high):
        high += 4.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):  # no number lies between them
            break
        low, high = (low, middle) if is_too_hot(middle) else (middle, high)
    return Weighting(kind=kind, temperature=float(np.exp((low + high) / 2)))


def row_sums(terms_QK: Array) -> Array:
    """Sums along the rows, one term after the other: zeros at the end or other rows cannot change the
    rounding."""
    if not terms_QK.shape[1]:
        return np.zeros(len(terms_QK))
    sums_Q: Array = np.add.accumulate(terms_QK, axis=1)[:, -1]
    return sums_Q


def _excess(squared_QK: Array, valid_QK: Array) -> Array:
    """Squared distances less the row's least valid one, float64; infinite where not valid."""
    distances_QK = np.where(valid_QK, squared_QK.astype(np.float64), np.inf)
    min_Q1 = distances_QK.min(axis=1, keepdims=True, initial=np.inf)
    return np.subtract(distances_QK, np.where(np.isfinite(min_Q1), min_Q1, 0.0), out=distances_QK)


def _normalized(kind: Kind, excess_QK: Array, temperature: float) -> Array:
    weights_QK = _KERNELS[kind](excess_QK / temperature)
    sums_Q1 = row_sums(weights_QK)[:, None]
    return np.divide(weights_QK, sums_Q1, out=np.zeros(weights_QK.shape), where=sums_Q1 > 0)
