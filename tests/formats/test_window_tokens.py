"""Windows as a model reads them: the begin tokens once before each, and the columns of its own tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.formats.corpus import CorpusSplit, open_corpus
from mlpmem_ds.formats.window_tokens import begins_with, window_tokens

from ..conftest import with_begin_tokens


def _corpus(corpus_dir: Path, tmp_path: Path, num_begin: int) -> CorpusSplit:
    """One window of its first 40 begins with the begin tokens itself: the 17th."""
    plain = open_corpus(corpus_dir)
    start = plain.windows()[17].context_start
    begin = tuple(plain.tokens(start, start + num_begin).tolist())
    return open_corpus(with_begin_tokens(corpus_dir, tmp_path / "begun", begin))


@pytest.mark.parametrize("num_begin", [0, 1, 2, 3])
def test_each_window_is_read_with_the_begin_tokens_once(
    corpus_dir: Path, tmp_path: Path, num_begin: int
) -> None:
    corpus = _corpus(corpus_dir, tmp_path, num_begin)
    begin, windows = list(corpus.begin_of_document_ids), corpus.windows()[:40]
    read = window_tokens(corpus, windows)
    assert read.tokens_BT.shape == (40, corpus.read_length) and corpus.read_length == 32 + num_begin
    own = 0
    for row, window in enumerate(windows):
        expected = corpus.tokens(window.context_start, window.stop).tolist()
        found, first = read.tokens_BT[row].tolist(), read.first_B[row]
        assert found[:num_begin] == begin
        whole = read.columns(row, Block(window.context_start, window.stop))
        assert found[whole] == expected and whole.start == first
        part = read.columns(row, Block(window.start, window.stop))
        assert found[part] == expected[window.start - window.context_start :]
        own += first == 0 and num_begin > 0
    assert own >= (num_begin > 0)


def test_what_begins_as_a_document_does() -> None:
    tokens = np.array([5, 6, 7])
    assert begins_with(tokens, ()) and begins_with(tokens, (5,)) and begins_with(tokens, (5, 6, 7, 8))
    assert not begins_with(tokens, (6,)) and not begins_with(tokens, (5, 7))
