"""Pipeline: a sample of hidden states → **the int8 codec of the keys** (mean, rotation, scale) → key shards.

Massive activations: in many language models a few fixed dimensions take values hundreds of times the others'
at a few tokens ("Massive Activations in Large Language Models", arXiv 2402.17762). One such dimension would
stretch the one global scale until every other number of a code rounds to 0. So a dimension whose greatest
deviation from its median in the sample is more than `MASSIVE_RATIO` times m, m being the median over the
dimensions of their root-mean-square deviation, is clipped to its median ± `MASSIVE_LIMIT` · max(m, its median
absolute deviation). What is usual in that dimension is kept, a position that carries the massive value stays
apart from those that do not, and dimensions that are merely large everywhere keep their range.

Shape legend: N states, D width of the base, E numbers of a code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

MASSIVE_RATIO = 100.0
MASSIVE_LIMIT = 10.0
_CLIP_QUANTILE = 0.9999  # of the code's numbers; the rest are clipped at ±127


@dataclass(frozen=True, kw_only=True)
class MassiveDimension:
    """A dimension that is clipped to [low, high] before the mean is taken off; `largest` = its greatest
    |deviation| seen."""

    dimension: int
    low: float
    high: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class FittedCodec:
    """mean [D] and rotation [D, E] in float64; `energy_kept` = share of the clipped sample's variance in E
    dimensions."""

    mean_D: Array
    rotation_DE: Array
    scale: float
    energy_kept: float
    massive: tuple[MassiveDimension, ...]


def find_massive_dimensions(states_ND: Array) -> tuple[MassiveDimension, ...]:
    """The massive dimensions of a sample, by the rule in the module's text; dimensions that never change do
    not count to m."""
    medians_D = np.median(states_ND, axis=0).astype(states_ND.dtype)
    deviations_ND = np.abs(states_ND - medians_D)
    largest_D = deviations_ND.max(axis=0)
    spreads_D = np.sqrt(np.square(deviations_ND).mean(axis=0, dtype=np.float64))
    if not spreads_D.any():
        return ()
    typical = float(np.median(spreads_D[spreads_D > 0]))
    found = []
    for dimension in np.flatnonzero(largest_D > MASSIVE_RATIO * typical).tolist():
        limit = MASSIVE_LIMIT * max(typical, float(np.median(deviations_ND[:, dimension])))
        middle, largest = float(medians_D[dimension]), float(largest_D[dimension])
        found.append(
            MassiveDimension(dimension=dimension, low=middle - limit, high=middle + limit, largest=largest)
        )
    return tuple(found)


def clip_massive(states_ND: Array, massive: Sequence[MassiveDimension]) -> Array:
    """The states with those dimensions clipped; a copy where there are any, else the states themselves."""
    if not massive:
        return states_ND
    clipped_ND = states_ND.copy()
    dimensions = [entry.dimension for entry in massive]
    low, high = ([getattr(entry, end) for entry in massive] for end in ("low", "high"))
    clipped_ND[:, dimensions] = np.clip(states_ND[:, dimensions], low, high)
    return clipped_ND


def fit_codec(states_ND: Array, dim: int, *, seed: int) -> FittedCodec:
    """The codec of E = `dim` numbers from a sample: leading principal directions, mixed by a random rotation.

    The rotation makes the code's numbers alike, so that one scale serves them all; the squared distance of
    two codes is then that of the states, up to what the other D - E directions hold and the rounding.

    Raises:
        ValueError: all states are equal, or `dim` is not in [1, D].
    """
    if not 1 <= dim <= states_ND.shape[1]:
        raise ValueError(f"{dim} dimensions cannot be taken of {states_ND.shape[1]}")
    massive = find_massive_dimensions(states_ND)
    clipped_ND = clip_massive(states_ND, massive).astype(np.float64)
    mean_D = clipped_ND.mean(axis=0)
    centred_ND = np.subtract(clipped_ND, mean_D, out=clipped_ND)
    variances_D, directions_DD = np.linalg.eigh(centred_ND.T @ centred_ND / len(centred_ND))
    leading_DE = directions_DD[:, ::-1][:, :dim]
    mixing_EE, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
    rotation_DE = leading_DE @ mixing_EE
    limit = float(np.quantile(np.abs(centred_ND @ rotation_DE), _CLIP_QUANTILE))
    if limit == 0:
        raise ValueError("all sampled keys are equal: this layer of the model says nothing about the text")
    return FittedCodec(
        mean_D=mean_D,
        rotation_DE=rotation_DE,
        scale=limit / 127,
        energy_kept=float(variances_D[::-1][:dim].sum() / variances_D.sum()),
        massive=massive,
    )
