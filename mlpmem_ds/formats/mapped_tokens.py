"""Tokens at any positions of a split, out of mapped files: for trainings of language models, whose sequences
lie all over it.

A rank holds none of them, and the ranks of a machine share what the system keeps. n numbers asked for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from mlpmem_ds.formats.corpus import CorpusSplit

_FILES_KEPT = 256  # the usual limit of open files is 1,024 a process


class MappedTokens:
    """The tokens of a split; `tokens[positions]` has them in the shape of the positions, int64. For one
    thread.

    With `answers` alone counting, a token that is none comes as its complement, `~token`, which is negative:
    it is read, and not learnt, such as what the user says.
    """

    def __init__(self, corpus: CorpusSplit) -> None:
        self._tokens = _MappedStream(corpus, corpus.token_files, corpus.dtype)
        self._answers = (
            _MappedStream(corpus, corpus.answer_files, np.dtype(bool)) if corpus.has_answers else None
        )

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        tokens_n = self._tokens.at(positions.ravel()).astype(np.int64)
        if self._answers is not None:
            np.invert(tokens_n, where=~self._answers.at(positions.ravel()), out=tokens_n)
        return tokens_n.reshape(positions.shape)


class _MappedStream:
    """A number a token in some files, one after another; the latest files stay mapped."""

    def __init__(self, corpus: CorpusSplit, names: Sequence[str], dtype: np.dtype[Any]) -> None:
        self._corpus, self._names, self._dtype = corpus, names, dtype
        sizes = [unit.tokens for unit in corpus.units if unit.tokens]
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
        self._mapped: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def at(self, positions_n: np.ndarray) -> np.ndarray:
        """The numbers at these positions, of the files' own dtype."""
        file_of_n = np.searchsorted(self._starts, positions_n, side="right") - 1
        order_n = np.argsort(file_of_n, kind="stable")
        files, firsts = np.unique(file_of_n[order_n], return_index=True)
        numbers_n = np.empty(len(positions_n), self._dtype)
        bounds = pairwise([*firsts.tolist(), len(order_n)])
        for file, (first, stop) in zip(files.tolist(), bounds, strict=True):
            rows = order_n[first:stop]
            numbers_n[rows] = self._file(file)[positions_n[rows] - self._starts[file]]
        return numbers_n

    def _file(self, number: int) -> np.ndarray:
        if number in self._mapped:
            self._mapped.move_to_end(number)
        else:
            while len(self._mapped) >= _FILES_KEPT:
                self._mapped.popitem(last=False)
            path = self._corpus.path_of(self._names[number])
            # Indexing a map of its own class costs several times as much.
            self._mapped[number] = np.asarray(np.memmap(path, self._dtype, mode="r"))
        return self._mapped[number]
