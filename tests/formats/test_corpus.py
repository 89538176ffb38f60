import shutil
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import publish_json, read_json
from mlpmem_ds.formats.corpus import SPLITS, num_tokens_of_splits, open_corpus, token_dtype


def test_the_stream_is_the_concatenation_of_the_shards(corpus_dir: Path) -> None:
    corpus = open_corpus(corpus_dir, "train")
    shards = [np.fromfile(path, corpus.dtype) for path in sorted((corpus_dir / "train").glob("tokens-*.bin"))]
    stream = np.concatenate(shards)
    assert len(stream) == corpus.num_tokens == corpus.num_positions + 1
    np.testing.assert_array_equal(corpus.tokens(0, corpus.num_tokens), stream)
    np.testing.assert_array_equal(corpus.tokens(3, 77), stream[3:77])
    np.testing.assert_array_equal(corpus.values(3, 77), stream[4:78])
    assert len(corpus.tokens(5, 5)) == 0
    with pytest.raises(ValueError):
        corpus.tokens(0, corpus.num_tokens + 1)


def test_documents_end_where_their_end_token_stands(corpus_dir: Path) -> None:
    for split in SPLITS:
        corpus = open_corpus(corpus_dir, split)
        stream = corpus.tokens(0, corpus.num_tokens)
        ends = np.flatnonzero(stream == corpus.end_of_document_id)
        np.testing.assert_array_equal(corpus.document_stops, ends + 1)
        positions = np.arange(corpus.num_positions)
        expected = np.searchsorted(
            ends, positions + 1
        )  # the document whose end is the first at or after the value
        np.testing.assert_array_equal(corpus.documents_of(positions), expected)
        first, stop = corpus.document_bounds(positions)
        counts = np.bincount(expected)
        np.testing.assert_array_equal(stop - first, counts[expected])
        assert ((first <= positions) & (positions < stop)).all()
        # Bounds are asked for on the train split, of millions of documents: their records are not kept.
        assert "documents" not in vars(corpus)
        assert sum(document["bytes"] for document in corpus.documents) == corpus.num_bytes
        assert corpus.numbers_of_documents("bytes").sum() == corpus.num_bytes


def test_small_vocabularies_take_two_bytes() -> None:
    assert (token_dtype(65536), token_dtype(65537)) == (np.dtype("<u2"), np.dtype("<u4"))


def test_empty_and_unknown_splits_are_refused(corpus_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text in split 'x'.*train"):
        open_corpus(corpus_dir, "x")
    with pytest.raises(UserError, match="--corpus .* does not exist"):
        open_corpus(tmp_path / "none")
    assert set(num_tokens_of_splits(corpus_dir)) == set(SPLITS)


def test_a_split_without_text_is_not_offered(corpus_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(corpus_dir, copy)
    manifest = read_json(copy / "manifest.json")
    for name in ("tuning", "heldout"):
        manifest["splits"][name] |= {"num_tokens": 0, "units": []}
    publish_json(copy / "manifest.json", manifest, seal=True)
    with pytest.raises(
        UserError, match=r"no text in split 'tuning'; it has \w+ \([\d,]+ tokens\), \w+ \([\d,]+"
    ):
        open_corpus(copy, "tuning")
    with pytest.raises(UserError) as caught:
        open_corpus(copy, "heldout")
    assert "tuning" not in str(caught.value) and " (0 tokens)" not in str(caught.value)


def test_a_contradicting_manifest_is_damaged(corpus_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(corpus_dir, copy)
    manifest = read_json(copy / "manifest.json")
    manifest["splits"]["train"]["num_tokens"] += 1
    publish_json(copy / "manifest.json", manifest, seal=True)
    with pytest.raises(DamagedDataError, match="contradicts"):
        open_corpus(copy)


def test_keys_that_this_version_does_not_have_are_refused(corpus_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(corpus_dir, copy)
    manifest = read_json(copy / "manifest.json")
    publish_json(copy / "manifest.json", {**manifest, "language": "en"}, seal=True)
    with pytest.raises(DamagedDataError, match="manifest.json: unknown key language.*version 1"):
        open_corpus(copy)
    del manifest["splits"]["train"]["num_bytes"]
    publish_json(copy / "manifest.json", manifest, seal=True)
    with pytest.raises(DamagedDataError, match="key num_bytes is missing in splits.train"):
        open_corpus(copy)
