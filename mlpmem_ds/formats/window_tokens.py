"""The windows of a corpus as a model reads them: each begins as a document does.

Some tokenizers put tokens before every text (`<s>`, `<bos>`), and a model that was trained so needs them:
without, its states and its predictions are of another kind. A document begins with them in the corpus, but
most windows begin in the middle of one. Such a window is read with the begin tokens put before it; their
columns are dropped, so that positions, windows and rows are those of a corpus without begin tokens. A model
reads P tokens more a window (P is 1 for the families that have any).

B windows, S tokens of each, P begin tokens, T = S + P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlpmem_ds.core.blocks import Block, Window
from mlpmem_ds.formats.corpus import CorpusSplit


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowTokens:
    """A batch of windows of equal length."""

    tokens_BT: np.ndarray
    """int64: what the model reads"""
    windows: Sequence[Window]
    first_B: Sequence[int]
    """the column of each window's first token: P, or 0 where it begins with the begin tokens itself"""

    def columns(self, row: int, block: Block) -> slice:
        """The columns of a window that stand for these of its positions; of all that a model gives."""
        shift = self.first_B[row] - self.windows[row].context_start
        return slice(block.start + shift, block.stop + shift)


def window_tokens(corpus: CorpusSplit, windows: Sequence[Window]) -> WindowTokens:
    """The tokens of windows of equal length, each with the begin tokens before it.

    A window that begins with them gets them at its end instead, to be as long as the others: a causal model
    gives the same for all that stands before.
    """
    tokens = [corpus.tokens(window.context_start, window.stop) for window in windows]
    begin = corpus.begin_of_document_ids
    if not begin:
        return WindowTokens(tokens_BT=np.stack(tokens), windows=windows, first_B=[0] * len(windows))
    has_own = [begins_with(tokens_S, begin) for tokens_S in tokens]
    return WindowTokens(
        tokens_BT=np.stack(
            [
                np.concatenate([tokens_S, begin] if own else [begin, tokens_S])
                for tokens_S, own in zip(tokens, has_own, strict=True)
            ]
        ),
        windows=windows,
        first_B=[0 if own else len(begin) for own in has_own],
    )


def begins_with(tokens_S: np.ndarray, begin: Sequence[int]) -> bool:
    """Whether a text begins as a document does; also where it has fewer tokens than that."""
    num_compared = min(len(begin), len(tokens_S))
    return np.array_equal(tokens_S[:num_compared], begin[:num_compared])
