"""Passages found by their words (BM25), with the bm25s library; it alone is used here.

Place in the pipeline: the arm of `answer_questions` that puts passages before a question.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.core.errors import package_for

_STOP_WORDS = "en"


def require_bm25s() -> Any:
    """The library.

    Raises:
        UserError: it is not installed.
    """
    with package_for("--passages", "bm25s", "pip install bm25s, or '.[passages]' of this package"):
        return importlib.import_module("bm25s")


class PassageIndex:
    """An index over texts; `build_passage_index` makes one, `open_passage_index` reads it again."""

    def __init__(self, retriever: Any, num_passages: int) -> None:
        self._retriever, self._num_passages = retriever, num_passages

    def search(self, query: str, count: int) -> list[int]:
        """The numbers of the nearest passages, the best first; fewer where there are fewer."""
        words = require_bm25s().tokenize(query, stopwords=_STOP_WORDS, show_progress=False)
        found, _ = self._retriever.retrieve(words, k=min(count, self._num_passages), show_progress=False)
        return [int(number) for number in np.asarray(found)[0]]

    def save(self, root: Path) -> list[str]:
        """Write the index's files below `root`, which exists; their names."""
        before = {path.name for path in root.iterdir()}
        self._retriever.save(str(root))
        return sorted(path.name for path in root.iterdir() if path.name not in before)


def build_passage_index(texts: Sequence[str]) -> PassageIndex:
    """Index these texts, at least one, by their words without the commonest English ones."""
    bm25s = require_bm25s()
    retriever = bm25s.BM25()
    retriever.index(
        bm25s.tokenize(list(texts), stopwords=_STOP_WORDS, show_progress=False), show_progress=False
    )
    return PassageIndex(retriever, len(texts))


def open_passage_index(root: Path, num_passages: int) -> PassageIndex:
    """What `save` wrote; mapped from the files."""
    return PassageIndex(require_bm25s().BM25.load(str(root), mmap=True), num_passages)
