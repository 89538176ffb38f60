"""What is scored: all positions, but those whose value is a begin token, which no model predicts; and which
splits."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json, read_sealed_json, record_file
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.stages.evaluation.splits import open_splits

BEGIN, END = (7, 8), 2


def _save_corpus(root: Path, corpus_dir: Path, splits: tuple[str, ...], num_begin: int) -> None:
    """Documents of begin tokens, numbers from 10 on, and the end token."""
    manifest = read_sealed_json(corpus_dir / "manifest.json")
    manifest["tokenizer"]["begin_of_document_ids"] = BEGIN[:num_begin]
    files = []
    for split in manifest["splits"]:
        lengths = (5, 1, 9, 30, 2, 4) if split in splits else ()
        documents = [[*BEGIN[:num_begin], *range(10, 10 + length), END] for length in lengths]
        tokens = np.array([token for document in documents for token in document], "<u2")
        unit = {"unit": "00000", "tokens": len(tokens), "documents": len(documents), "bytes": 99}
        unit |= {"unknown": 0, "dropped": 0, "answers": 0, "answer_bytes": 0}
        totals = {"num_tokens": len(tokens), "num_documents": len(documents), "num_bytes": 99}
        totals |= {"num_unknown": 0, "num_dropped": 0, "num_answers": 0, "num_answer_bytes": 0}
        manifest["splits"][split] = totals | {"units": [unit] if documents else []}
        (root / split).mkdir(parents=True)
        (root / split / "tokens-00000.bin").write_bytes(tokens.tobytes())
        (root / split / "documents-00000.jsonl").write_text(
            "".join(
                f'{{"name": "{number}", "group": "", "bytes": 9, "tokens": {len(document)}}}\n'
                for number, document in enumerate(documents)
            )
        )
        names = (f"{split}/tokens-00000.bin", f"{split}/documents-00000.jsonl")
        files += [record_file(root, name).to_json() for name in names]
    manifest["files"] = files
    publish_json(root / "manifest.json", manifest, seal=True)


@pytest.mark.parametrize("num_begin", [0, 1, 2])
@pytest.mark.parametrize("present", [("tuning", "test"), ("train",)])
def test_begin_tokens_are_given_and_not_scored(
    corpus_dir: Path, tmp_path: Path, num_begin: int, present: tuple[str, ...]
) -> None:
    _save_corpus(tmp_path, corpus_dir, present, num_begin)
    splits = open_splits(
        tmp_path, tuning="tuning", test="test", extra=(), is_extra_requested=False, min_positions=1
    )
    scored: dict[str, list[int]] = {}
    for split in splits.values():
        corpus = split.corpus
        values_N = split.take(corpus.values(0, corpus.num_positions))
        assert split.num_positions == len(values_N)
        scored.setdefault(corpus.name, []).extend(values_N.tolist())
    for name, values in scored.items():
        corpus = open_corpus(tmp_path, name)
        expected = [value for value in corpus.values(0, corpus.num_positions).tolist() if value not in BEGIN]
        assert sorted(values) == sorted(expected)
    if num_begin == 0 and present != ("train",):
        assert all(split.positions is None for split in splits.values())


@pytest.mark.parametrize("is_requested", [False, True])
@pytest.mark.parametrize("present", [("tuning", "test"), ("train",)])
def test_a_further_split_that_is_missing_is_said(
    corpus_dir: Path,
    tmp_path: Path,
    present: tuple[str, ...],
    is_requested: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _save_corpus(tmp_path, corpus_dir, present, 0)
    names = {"tuning": "tuning", "test": "test"}
    with caplog.at_level(logging.INFO):
        splits = open_splits(
            tmp_path, **names, extra=("wiki",), is_extra_requested=is_requested, min_positions=1
        )
    assert list(splits) == ["tuning", "test"]
    assert caplog.text.count("the corpus has no split wiki: the report goes without it") == is_requested


def test_a_split_that_is_dealt_is_not_reported_as_well(corpus_dir: Path, tmp_path: Path) -> None:
    _save_corpus(tmp_path, corpus_dir, ("train",), 0)
    names = {"tuning": "tuning", "test": "test"}
    with pytest.raises(
        UserError, match="--extra-splits train: the corpus has no other split.*leave train out"
    ):
        open_splits(tmp_path, **names, extra=("train",), is_extra_requested=True, min_positions=1)
