"""Tokens at any positions of a split, out of mapped files: for trainings of language models, whose sequences
lie all over it.

A rank holds none of them, and the ranks of a machine share what the system keeps. n numbers asked for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.rows_by_file import rows_by_file

_FILES_KEPT = 256  # the usual limit of open files is 1,024 a process


class MappedTokens:
    """The tokens of a split; `tokens[positions]` has them in the shape of the positions, int64. For one
    thread.

    With `answers` alone counting, a token that is none comes as its complement, `~token`, which is negative:
    it is read, and not learnt, such as what the user says.
    """

    def __init__(self, corpus: CorpusSplit) -> None:
        self._corpus = corpus
        self._mapped = lru_cache(_FILES_KEPT)(self._map)

    def __len__(self) -> int:
        return self._corpus.num_tokens

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        corpus, positions_n = self._corpus, positions.ravel()
        file_of_n = np.searchsorted(corpus.shard_starts, positions_n, side="right") - 1
        tokens_n = np.empty(len(positions_n), np.int64)
        for file, rows in rows_by_file(file_of_n):
            places = positions_n[rows] - corpus.shard_starts[file]
            tokens = self._mapped(corpus.token_files[file], corpus.dtype)[places].astype(np.int64)
            if corpus.has_answers:
                is_answer = self._mapped(corpus.answer_files[file], np.dtype(bool))[places]
                np.invert(tokens, where=~is_answer, out=tokens)
            tokens_n[rows] = tokens
        return tokens_n.reshape(positions.shape)

    def _map(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        """A file of the split; the latest ones stay mapped."""
        # Indexing a map of its own class costs several times as much.
        return np.asarray(np.memmap(self._corpus.path_of(name), dtype, mode="r"))
