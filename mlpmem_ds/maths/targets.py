"""Pipeline: neighbours → **kNN targets** → target shards. Also the label's probability alone, for evaluation.

``p(v) = Σ_{j: value_j = v} w_j`` over the neighbours j of a position, with the weights of weighting.py
(kNN-LM, arXiv 1911.00172; MLP Memory, arXiv 2508.01832). All in float64, sparse, and every sum runs in the
order of its row: a row's result does not depend on the other rows. (Across kinds of processor `exp` may
differ in the last bit.)

Shape legend: Q queries (rows), K neighbours a row, W widest row, nnz stored entries.
"""

from typing import Any, TypeAlias

import numpy as np

from mlpmem_ds.maths.sparse_rows import SparseRows
from mlpmem_ds.maths.weighting import row_sums

Array: TypeAlias = np.ndarray[Any, Any]


def aggregate(weights_QK: Array, values_QK: Array) -> SparseRows:
    """Add the weights of neighbours with the same value; neighbours of weight 0 leave no entry.

    ``values_QK`` non-negative integers (token ids) where the weight is positive. A value's weights are added
    in the order of its neighbours in the row.
    """
    num_rows, num_neighbours = weights_QK.shape
    if not weights_QK.size:
        return SparseRows.empty(num_rows)
    used_QK = weights_QK > 0
    # One integer sort does it all: value first, then place in the row; what has no weight goes last.
    last = np.iinfo(np.int64).max
    keys_QK = np.where(used_QK, values_QK.astype(np.int64) * num_neighbours + np.arange(num_neighbours), last)
    keys_QK.sort(axis=1)
    kept_QK = keys_QK != last
    sorted_QK, places_QK = np.divmod(np.where(kept_QK, keys_QK, 0), num_neighbours)
    is_first_QK = kept_QK.copy()
    is_first_QK[:, 1:] &= sorted_QK[:, 1:] != sorted_QK[:, :-1]
    weights = np.take_along_axis(weights_QK, places_QK, axis=1)[kept_QK]
    entries = np.cumsum(is_first_QK[kept_QK]) - 1
    num_entries_Q = is_first_QK.sum(axis=1)
    sums = np.bincount(entries, weights=weights, minlength=int(num_entries_Q.sum())).astype(np.float64)
    return SparseRows.from_counts(num_entries_Q, sorted_QK[is_first_QK], sums)


def truncate(rows: SparseRows, mass: float, keep_ids_Q: Array | None = None) -> SparseRows:
    """Keep each row's most probable ids until they hold ``mass`` of its total; of equal ones the lower id
    comes first.

    ``keep_ids_Q``: one id a row (the gold token) that stays if the row has it. What is kept is not
    renormalized; what is not joins the rows' dropped mass. Raises ValueError for a mass outside (0, 1].
    """
    if not 0 < mass <= 1:
        raise ValueError(
            f"mass is {mass}; it is the share of a row's probability to keep, above 0 and at most 1"
        )
    counts_Q, row_of_entry = rows.counts_n, rows.row_of_E
    keep = _in_head(rows, counts_Q, row_of_entry, mass)
    if keep_ids_Q is not None:
        keep |= rows.ids == keep_ids_Q[row_of_entry]
    kept_counts_Q = np.bincount(row_of_entry[keep], minlength=len(counts_Q))
    dropped_Q = np.bincount(row_of_entry[~keep], weights=rows.probabilities[~keep], minlength=len(counts_Q))
    return SparseRows.from_counts(
        kept_counts_Q, rows.ids[keep], rows.probabilities[keep], rows.dropped + dropped_Q
    )


def knn_probability(weights_QK: Array, values_QK: Array, labels_Q: Array) -> Array:
    """Probability that the kNN distribution gives the label, float64 [Q]; 0 if no neighbour carries it."""
    return row_sums(np.where(values_QK == labels_Q[:, None], weights_QK, 0.0))


def _in_head(rows: SparseRows, counts_Q: Array, row_of_entry: Array, mass: float) -> Array:
    """True for the entries [nnz] that are needed to reach the mass."""
    columns = np.arange(len(rows.ids)) - rows.offsets[row_of_entry]
    padded_QW = np.zeros((len(counts_Q), int(counts_Q.max(initial=0))))
    padded_QW[row_of_entry, columns] = rows.probabilities
    order_QW = np.argsort(-padded_QW, axis=1, kind="stable")
    sorted_QW = np.take_along_axis(padded_QW, order_QW, axis=1)
    reached_QW = np.cumsum(sorted_QW, axis=1)
    needed_QW = np.zeros(padded_QW.shape, dtype=bool)
    before_QW = np.concatenate([np.zeros((len(counts_Q), 1)), reached_QW[:, :-1]], axis=1)[
        :, : padded_QW.shape[1]
    ]
    np.put_along_axis(needed_QW, order_QW, before_QW < mass * reached_QW[:, -1:], axis=1)
    return needed_QW[row_of_entry, columns]
