"""Pipeline: neighbours by raw keys and by stored codes → **how far the codes' targets are from the raw keys'** → the audit.

Shape legend: Q queries, K neighbours, W neighbours of both kinds.
"""

from typing import Any, TypeAlias

import numpy as np

from .knn import Neighbours

Array: TypeAlias = np.ndarray[Any, Any]


def merge_neighbours(first: Neighbours, second: Neighbours, k: int) -> Neighbours:
    """The k nearest of both, in the order (distance, id); each is in that order, and `second`'s ids are the greater."""
    ids_QW = np.concatenate([first.ids_QK, second.ids_QK], axis=1)
    distances_QW = np.concatenate([first.distances_QK, second.distances_QK], axis=1)
    order_QK = np.argsort(distances_QW, axis=1, kind="stable")[:, :k]
    return Neighbours(
        ids_QK=np.take_along_axis(ids_QW, order_QK, axis=1),
        distances_QK=np.take_along_axis(distances_QW, order_QK, axis=1),
    )


def recall(found_QK: Array, wanted_QK: Array) -> float:
    """Mean share of a row's wanted ids that were found; -1 is no id, and rows that want none do not count.

    Raises ValueError when no row wants an id.
    """
    wanted = wanted_QK >= 0
    counts_Q = wanted.sum(axis=1)
    if not counts_Q.any():
        raise ValueError("no row has a neighbour, so there is no recall")
    stride = int(max(found_QK.max(initial=0), wanted_QK.max(initial=0))) + 1
    rows_Q1 = np.arange(len(wanted_QK))[:, None] * stride
    hits_QK = np.isin(np.where(wanted, wanted_QK + rows_Q1, -1), (found_QK + rows_Q1)[found_QK >= 0]) & wanted
    return float((hits_QK.sum(axis=1)[counts_Q > 0] / counts_Q[counts_Q > 0]).mean())


def total_variation(weights_QK: Array, values_QK: Array, other_weights_QK: Array, other_values_QK: Array) -> Array:
    """½ Σ_v |p(v) - q(v)| of each row's two distributions over values, float64 [Q]; values are integers, weights ≥ 0."""
    signed_QW = np.concatenate([weights_QK, -other_weights_QK], axis=1)
    values_QW = np.concatenate([values_QK, other_values_QK], axis=1)
    order_QW = np.argsort(values_QW, axis=1, kind="stable")
    signed_QW = np.take_along_axis(signed_QW, order_QW, axis=1)
    values_QW = np.take_along_axis(values_QW, order_QW, axis=1)
    is_first_QW = np.ones(values_QW.shape, dtype=bool)
    is_first_QW[:, 1:] = values_QW[:, 1:] != values_QW[:, :-1]
    sums = np.add.reduceat(signed_QW.ravel(), np.flatnonzero(is_first_QW))
    rows = np.nonzero(is_first_QW)[0]
    return np.bincount(rows, weights=np.abs(sums), minlength=len(values_QW)) / 2
