"""Passages are found by their words, also after the index was written and read."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlpmem_ds.engines.passage_index import build_passage_index, open_passage_index

pytest.importorskip("bm25s", reason="the optional package bm25s is not installed")
TEXTS = ["the moon is grey", "a cat eats fish", "cats and dogs fish for fish", "the sun is bright"]


def test_the_passage_with_the_words_is_the_first(tmp_path: Path) -> None:
    index = build_passage_index(TEXTS)
    assert index.search("how grey is the moon", 1) == [0]
    assert index.search("which fish does a cat eat", 2)[0] == 1
    assert len(index.search("fish", 9)) == 4  # no more than there are
    names = index.save(tmp_path)
    assert names
    again = open_passage_index(tmp_path, len(TEXTS))
    for query in ("grey moon", "dogs", "a bright sun"):
        assert again.search(query, 3) == index.search(query, 3)
