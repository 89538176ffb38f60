"""Part of list search: the ranks of a block's candidates → **the nearest of each query**, many queries in one
call of NumPy.

A loop over queries has ten short calls for each, and two threads of them hand the interpreter's lock to one
another more often than they compute: they took half as long again as one. Here a call works on a hundred
thousand candidates.

Shape legend: B queries of a block, P probes, R queries of a part, W candidates of the longest of them, S
survivors, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from mlpmem_ds.maths.neighbours import MISSING, NO_BOUND

Array: TypeAlias = np.ndarray[Any, Any]

_CANDIDATES = 1 << 17  # of a part: their ranks and places stay in the cache


@dataclass(frozen=True, kw_only=True)
class CandidateBlock:
    """Candidates of a block of queries, in pieces, one a probed list.

    The ranks (int32) of query b in its p-th list are ``ranks[starts_BP[b, p]:][:sizes_BP[b, p]]``, their ids
    ``ids[first_ids_BP[b, p]:]``. The last of `ranks` is NO_BOUND, which is that of a key that is hidden too.
    ``offsets_B`` is added to a query's packed neighbours, ``own_ids_B`` (or None) is an id that it may not
    find.
    """

    ranks: Array
    starts_BP: Array
    sizes_BP: Array
    ids: Array
    first_ids_BP: Array
    offsets_B: Array
    own_ids_B: Array | None

    def split_rows(self) -> list[range]:
        """The queries, in parts that `nearest` takes well."""
        totals_B = self.sizes_BP.sum(axis=1)
        rows = max(1, _CANDIDATES // max(1, int(totals_B.max(initial=0))))
        return [range(start, min(start + rows, len(totals_B))) for start in range(0, len(totals_B), rows)]

    def nearest(self, rows: range, k: int, id_bits: int) -> Array:
        """The k least packed candidates of some queries in order, int64 [R, K], MISSING where there are
        fewer."""
        part = slice(rows.start, rows.stop)
        sizes_RP, num_rows = self.sizes_BP[part], len(rows)
        totals_R = sizes_RP.sum(axis=1)
        num_kept = k + (self.own_ids_B is not None)
        width = max(num_kept, int(totals_R.max()))
        # Rows of equal length: a last piece of NO_BOUND fills the shorter ones.
        pieces = np.append(sizes_RP, (width - totals_R)[:, None], axis=1).ravel()
        firsts = np.cumsum(pieces) - pieces
        shifts_RP = np.append(self.starts_BP[part], np.zeros((num_rows, 1), np.int64), axis=1)
        places = np.repeat(shifts_RP.ravel() - firsts, pieces)
        places += np.arange(len(places))
        places.reshape(num_rows, width)[np.arange(width) >= totals_R[:, None]] = len(self.ranks) - 1
        ranks_RW = self.ranks.take(places).reshape(num_rows, width)
        bound_R = np.minimum(np.partition(ranks_RW, num_kept - 1, axis=1)[:, num_kept - 1], NO_BOUND - 1)
        kept_RW = ranks_RW <= bound_R[:, None]
        counts_R = np.count_nonzero(kept_RW, axis=1)
        flat_S = np.flatnonzero(kept_RW)
        # Survivors ascend, so those of one piece lie together.
        counts = np.diff(np.searchsorted(flat_S, firsts), append=len(flat_S))
        id_shifts_RP = np.append(self.first_ids_BP[part], np.zeros((num_rows, 1), np.int64), axis=1)
        ids_S = self.ids[flat_S + np.repeat(id_shifts_RP.ravel() - firsts, counts)]
        packed_S = (ranks_RW.ravel()[flat_S].astype(np.int64) << id_bits) | ids_S
        packed_S += np.repeat(self.offsets_B[part], counts_R)
        if self.own_ids_B is not None:
            packed_S[ids_S == np.repeat(self.own_ids_B[part], counts_R)] = MISSING
        most = max(k, int(counts_R.max()))
        table_RW = np.full((num_rows, most), MISSING)
        starts_R = np.arange(num_rows) * most - (np.cumsum(counts_R) - counts_R)
        table_RW.ravel()[np.repeat(starts_R, counts_R) + np.arange(len(flat_S))] = packed_S
        table_RW.sort(axis=1)
        return table_RW[:, :k]
