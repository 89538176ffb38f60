"""Pipeline: targets → **how far they are from the truth**. Recall of neighbours, distances of sparse
distributions, row validity.

Shape legend: Q queries (rows), K neighbours a row, C of them compared, W neighbours of both kinds, nnz stored
entries.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from mlpmem_ds.maths.sparse_rows import SparseRows

Array: TypeAlias = np.ndarray[Any, Any]

_MIN_SMOOTHING = 1e-6
_MAX_SUM_ERROR = 1e-3


@dataclass(frozen=True, kw_only=True)
class RowComparison:
    """Of each row, float64 [Q]: total variation (0 to 1) and Kullback-Leibler divergence (nats)."""

    total_variation_Q: Array
    divergence_Q: Array


def recall(found_QK: Array, truth_QK: Array, count: int) -> Array:
    """Share of the `count` nearest true neighbours that are among the `count` first found ones, float64 [Q].

    Ids, -1 where missing; a row with no true neighbour has recall 1.
    """
    found_QC, truth_QC = found_QK[:, :count], truth_QK[:, :count]
    rows_Q1 = np.arange(len(truth_QC))[:, None]
    base = max(int(truth_QC.max(initial=0)), int(found_QC.max(initial=0))) + 1
    keys_of_found = (rows_Q1 * base + found_QC)[found_QC >= 0]
    keys_of_truth = (rows_Q1 * base + truth_QC)[truth_QC >= 0]
    hits = keys_of_truth[np.isin(keys_of_truth, keys_of_found, assume_unique=True)] // base
    num_true_Q = (truth_QC >= 0).sum(axis=1)
    hits_Q = np.bincount(hits, minlength=len(truth_QC))
    return np.where(num_true_Q > 0, hits_Q / np.maximum(num_true_Q, 1), 1.0)


def compare_rows(truth: SparseRows, found: SparseRows, vocab_size: int) -> RowComparison:
    """How far found rows are from true ones; both are normalized first.

    The divergence is KL(truth ‖ found), where the dropped mass (but at least 1e-6) of a found row is spread
    evenly over the vocabulary: without that one missing id makes it infinite. Two empty rows agree; an empty
    and a full one are 1 apart.
    """
    num_rows = found.num_rows
    keys_of_truth, shares_of_truth = _shares(truth, vocab_size)
    keys_of_found, shares_of_found = _shares(found, vocab_size)
    keys, places = np.unique(np.concatenate([keys_of_truth, keys_of_found]), return_inverse=True)
    p, q = np.zeros(len(keys)), np.zeros(len(keys))
    p[places[: len(keys_of_truth)]] = shares_of_truth
    q[places[len(keys_of_truth) :]] = shares_of_found
    rows = keys // vocab_size
    variation_Q = np.bincount(rows, weights=np.abs(p - q), minlength=num_rows) / 2
    one_empty_Q = (truth.counts_n == 0) != (found.counts_n == 0)
    smoothing = np.maximum(found.dropped, _MIN_SMOOTHING)[rows]
    smooth_q = (1 - smoothing) * q + smoothing / vocab_size
    terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / smooth_q), 0.0)
    return RowComparison(
        total_variation_Q=np.where(one_empty_Q, 1.0, variation_Q),
        divergence_Q=np.bincount(rows, weights=terms, minlength=num_rows),
    )


def neighbour_variation(
    weights_QK: Array, values_QK: Array, other_weights_QK: Array, other_values_QK: Array
) -> Array:
    """½ Σ_v |p(v) - q(v)| of each row's two sets of weighted neighbours, float64 [Q]; values are integers,
    weights ≥ 0."""
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


def probability_of(rows: SparseRows, ids_Q: Array) -> Array:
    """The probability of one id in each row, as stored, float64 [Q]; 0 where the row does not have it."""
    row_of_entry = rows.row_of_E
    is_asked = rows.ids == ids_Q[row_of_entry]
    return np.bincount(row_of_entry[is_asked], weights=rows.probabilities[is_asked], minlength=len(ids_Q))


def count_faulty_rows(rows: SparseRows, vocab_size: int) -> dict[str, int]:
    """Rows that no target may have: `unsorted` (ids must ascend), `outside` (an id that is no token, such as
    -1), `not_finite` (NaN, infinite, zero or negative probabilities) and `wrong_sum` (kept and dropped mass
    more than 1e-3 from 1)."""
    num_rows, counts_Q, row_of_entry = rows.num_rows, rows.counts_n, rows.row_of_E

    def rows_with(is_bad: Array, row_of: Array) -> int:
        return len(np.unique(row_of[is_bad]))

    same_row = row_of_entry[1:] == row_of_entry[:-1]
    kept_Q = np.bincount(row_of_entry, weights=np.nan_to_num(rows.probabilities), minlength=num_rows)
    sums_Q = kept_Q + rows.dropped
    is_bad = ~(np.isfinite(rows.probabilities) & (rows.probabilities > 0))
    return {
        "unsorted": rows_with(same_row & (rows.ids[1:] <= rows.ids[:-1]), row_of_entry[1:]),
        "outside": rows_with((rows.ids < 0) | (rows.ids >= vocab_size), row_of_entry),
        "not_finite": rows_with(is_bad, row_of_entry),
        "wrong_sum": int(((counts_Q > 0) & ~(np.abs(sums_Q - 1) <= _MAX_SUM_ERROR)).sum()),
    }


def _shares(rows: SparseRows, vocab_size: int) -> tuple[Array, Array]:
    """(row * V + id, probability over the row's sum) of each entry."""
    row_of_entry = rows.row_of_E
    sums_Q = np.bincount(row_of_entry, weights=rows.probabilities, minlength=rows.num_rows)
    return row_of_entry * np.int64(vocab_size) + rows.ids, rows.probabilities / sums_Q[row_of_entry]
