"""Sparse distributions, one a row: the record in which targets travel from the search to the loss.

Made by `targets` in int64 and float64; read from shards as int32 and float32.

Shape legend: n rows, E entries of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class SparseRows:
    """Row r has ``ids[offsets[r]:offsets[r + 1]]``, ascending and distinct, with their probabilities.

    ``offsets`` int64 [n + 1], from 0; ``ids`` integers [E]; ``probabilities`` floats [E], not renormalized
    after truncation; ``dropped`` floats [n], the mass that truncation took from each row.
    """

    offsets: Array
    ids: Array
    probabilities: Array
    dropped: Array

    @classmethod
    def from_counts(
        cls, counts_n: Array, ids: Array, probabilities: Array, dropped: Array | None = None
    ) -> SparseRows:
        """Rows of so many entries each; without `dropped` nothing is missing from them."""
        return cls(
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_n, dtype=np.int64)]),
            ids=ids,
            probabilities=probabilities,
            dropped=np.zeros(len(counts_n), probabilities.dtype) if dropped is None else dropped,
        )

    @classmethod
    def empty(cls, num_rows: int) -> SparseRows:
        """Rows without entries, in int64 and float64."""
        return cls.from_counts(np.zeros(num_rows, np.int64), np.empty(0, np.int64), np.empty(0))

    @classmethod
    def join(cls, parts: Sequence[SparseRows]) -> SparseRows:
        """The rows of the parts (at least one, all of the same dtypes), one part after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls.from_counts(
            np.concatenate([part.counts_n for part in parts]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.probabilities for part in parts]),
            np.concatenate([part.dropped for part in parts]),
        )

    @classmethod
    def gather(cls, parts: Sequence[SparseRows], part_of_m: Array, row_of_m: Array) -> SparseRows:
        """Rows of the parts (at least one, all of the same dtypes), in the order asked for: row
        ``row_of_m[i]`` of part ``part_of_m[i]``; each entry is copied once."""
        chosen = [np.flatnonzero(part_of_m == number) for number in range(len(parts))]
        counts_m = np.empty(len(part_of_m), np.int64)
        dropped_m = np.empty(len(part_of_m), parts[0].dropped.dtype)
        for part, places in zip(parts, chosen, strict=True):
            rows = row_of_m[places]
            counts_m[places] = part.offsets[rows + 1] - part.offsets[rows]
            dropped_m[places] = part.dropped[rows]
        ends_m = np.cumsum(counts_m)
        num_entries = int(ends_m[-1]) if len(ends_m) else 0
        ids_E = np.empty(num_entries, parts[0].ids.dtype)
        probabilities_E = np.empty(num_entries, parts[0].probabilities.dtype)
        for part, places in zip(parts, chosen, strict=True):
            counts = counts_m[places]
            inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            source = inside + np.repeat(part.offsets[row_of_m[places]], counts)
            target = inside + np.repeat(ends_m[places] - counts, counts)
            ids_E[target] = part.ids[source]
            probabilities_E[target] = part.probabilities[source]
        return cls.from_counts(counts_m, ids_E, probabilities_E, dropped_m)

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts_n(self) -> Array:
        """Entries of each row, int64 [n]."""
        return np.diff(self.offsets)

    @property
    def row_of_E(self) -> Array:
        """The row of each entry, int64 [E]."""
        return np.repeat(np.arange(self.num_rows), self.counts_n)

    def ids_ascend(self) -> bool:
        """Whether the ids of each row ascend without a repeat, as those of shards do."""
        ascends_E = self.ids[1:] > self.ids[:-1]
        starts = self.offsets[1:-1]
        ascends_E[starts[(starts > 0) & (starts < len(self.ids))] - 1] = True
        return bool(ascends_E.all())

    def take(self, indices_m: Array) -> SparseRows:
        """The rows at these indices, in their order; an index may repeat."""
        counts_m = self.offsets[indices_m + 1] - self.offsets[indices_m]
        starts_m = np.cumsum(counts_m) - counts_m
        entries_E = np.repeat(self.offsets[indices_m] - starts_m, counts_m) + np.arange(counts_m.sum())
        return self.from_counts(
            counts_m, self.ids[entries_E], self.probabilities[entries_E], self.dropped[indices_m]
        )

    def rows(self, start: int, stop: int) -> SparseRows:
        """The rows [start, stop), without a copy of the entries."""
        if (start, stop) == (0, self.num_rows):
            return self
        entries = slice(int(self.offsets[start]), int(self.offsets[stop]))
        return SparseRows(
            offsets=self.offsets[start : stop + 1] - self.offsets[start],
            ids=self.ids[entries],
            probabilities=self.probabilities[entries],
            dropped=self.dropped[start:stop],
        )

    def astype(self, ids: Any, probabilities: Any) -> SparseRows:
        """The same with entries of these dtypes; the dropped mass keeps its own."""
        return SparseRows(
            offsets=self.offsets,
            ids=self.ids.astype(ids, copy=False),
            probabilities=self.probabilities.astype(probabilities, copy=False),
            dropped=self.dropped,
        )
