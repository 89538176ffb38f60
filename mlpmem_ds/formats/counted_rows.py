"""Rows of keys, targets and a training ↔ positions of the corpus: the positions whose values count, in order.

Where all count, row n is position n. Where answers of conversations alone count (`counts` of the corpus is
`answers`), the datastore holds these: row r is the position whose value is the r-th token of an answer, and
what is numbered by rows (index, targets, order of the training) has no gap.

n rows.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property

import numpy as np

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.formats.corpus import CorpusSplit

_UNITS_KEPT = 2  # of 8 bytes a row: a unit has some million tokens


class CountedRows:
    """The rows of a split; any thread may ask."""

    def __init__(self, corpus: CorpusSplit) -> None:
        self._corpus = corpus
        self._units: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_rows(self) -> int:
        return self._corpus.num_counted

    def positions(self, rows: Block) -> np.ndarray:
        """int64 [n]: the positions of the rows [start, stop), ascending. Raises ValueError for rows outside
        the split."""
        if not self._corpus.has_answers:
            return np.arange(*rows)
        if not 0 <= rows.start <= rows.stop <= self.num_rows:
            raise ValueError(f"rows [{rows.start}, {rows.stop}) are not among {self.num_rows}")
        parts = [np.empty(0, np.int64)]
        first = int(np.searchsorted(self._row_starts, rows.start, side="right")) - 1
        for unit in range(max(first, 0), len(self._row_starts) - 1):
            start, stop = (int(edge) for edge in self._row_starts[unit : unit + 2])
            if start >= rows.stop:
                break
            if start < stop:
                parts.append(self._of_unit(unit)[max(rows.start - start, 0) : rows.stop - start])
        return np.concatenate(parts)

    def span(self, rows: Block) -> Block:
        """The positions from the first to the last of some rows (at least one)."""
        if not self._corpus.has_answers:
            return rows
        first = self.positions(Block(rows.start, rows.start + 1))
        last = self.positions(Block(rows.stop - 1, rows.stop))
        return Block(int(first[0]), int(last[0]) + 1)

    def offsets(self, positions: Block) -> np.ndarray | None:
        """int64: which of the positions [start, stop) have a row, counted from `start`; None where all do."""
        if not self._corpus.has_answers:
            return None
        return np.flatnonzero(self._corpus.counted(*positions))

    def document_bounds(self, rows_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first, stop), both int64 [n]: the rows [first, stop) have values of the same document as each."""
        if not self._corpus.has_answers:
            return self._corpus.document_bounds(rows_n)
        documents_n = np.searchsorted(self._document_stops, rows_n, side="right")
        first_n = np.where(documents_n > 0, self._document_stops[np.maximum(documents_n - 1, 0)], 0)
        return first_n, self._document_stops[documents_n]

    @cached_property
    def _document_stops(self) -> np.ndarray:
        """int64 [documents]: one past each document's last row."""
        return np.cumsum(self._corpus.numbers_of_documents("answers"))

    @cached_property
    def _token_starts(self) -> list[int]:
        return np.cumsum([0, *(unit.tokens for unit in self._corpus.units)], dtype=np.int64).tolist()

    @cached_property
    def _row_starts(self) -> np.ndarray:
        return np.cumsum([0, *(unit.answers for unit in self._corpus.units)], dtype=np.int64)

    def _of_unit(self, unit: int) -> np.ndarray:
        """The positions of a unit's rows."""
        with self._lock:
            if unit not in self._units:
                start, stop = self._token_starts[unit : unit + 2]
                while len(self._units) >= _UNITS_KEPT:
                    self._units.popitem(last=False)
                # The value of a position is the token after it.
                self._units[unit] = np.flatnonzero(self._corpus.is_answer(start, stop)) + start - 1
            self._units.move_to_end(unit)
            return self._units[unit]
