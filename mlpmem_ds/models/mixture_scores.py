"""The mixture of two log-probabilities a position, for those who keep them in NumPy: report and validation.

`models.mixture` with arrays in and out, float64. Not part of an export.

Shapes: N positions, G weights of a grid.
"""

from typing import Any, TypeAlias

import numpy as np
import torch

from mlpmem_ds.maths.scores import perplexity
from mlpmem_ds.models.mixture import Grid, log_mixture, log_mixture_of_bank

Array: TypeAlias = np.ndarray[Any, Any]


def mixed_scores(log_base_N: Array, log_memory_N: Array, lmbda: float | Array) -> Array:
    """float64 [N]: log((1-λ)·base + λ·memory), for a number λ or an array [N] of them; the ends are exact.

    Raises ValueError for a λ outside [0, 1].
    """
    weight = _float64(lmbda)
    if not bool(((weight >= 0) & (weight <= 1)).all()):
        raise ValueError(
            f"λ in [{float(weight.min())}, {float(weight.max())}]: the memory's share of the mixture lies in"
            " [0, 1]"
        )
    mixed_N: Array = log_mixture(_float64(log_base_N), _float64(log_memory_N), weight).numpy()
    return mixed_N


def pooled_scores(log_memories_NM: Array, weights_NM: Array) -> tuple[Array, Array]:
    """A bank as one memory: log of the memories' mixture by their shares, and λ, the sum of their weights,
    both float64 [N]. Mixed at that λ it is the bank's mixture; where λ is 0 the shares are equal."""
    logs, weights = _float64(log_memories_NM), _float64(weights_NM)
    totals = weights.sum(-1)
    shares = torch.where(totals[:, None] > 0, weights / totals[:, None], 1 / weights.shape[1])
    first, *others = logs.unbind(-1)
    pooled = log_mixture_of_bank(first, others, shares[:, 1:]) if others else first
    return pooled.numpy(), totals.clamp_max(1).numpy()


def lambda_curve(log_base_N: Array, log_memory_N: Array, grid: Grid) -> Array:
    """Perplexity [G] of the mixture at each λ of the grid; at 0 and 1 exactly those of the two alone.

    One λ after the other: [G, N] would be large. Raises ValueError unless both hold the same positions, at
    least one.
    """
    if len(log_base_N) != len(log_memory_N) or not len(log_base_N):
        raise ValueError(
            f"{len(log_base_N)} and {len(log_memory_N)} log-probabilities; both need the same positions, at"
            " least 1"
        )
    base_N, memory_N = _float64(log_base_N), _float64(log_memory_N)
    return np.array([perplexity(log_mixture(base_N, memory_N, weight).numpy()) for weight in grid()])


def _float64(values: float | Array) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64))
