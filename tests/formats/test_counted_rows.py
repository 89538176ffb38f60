from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.files import publish_json, read_sealed_json, sha256_of_file
from mlpmem_ds.formats.corpus import CorpusSplit, open_corpus
from mlpmem_ds.formats.counted_rows import CountedRows


@pytest.fixture
def marked(corpus_dir: Path, tmp_path: Path) -> tuple[CorpusSplit, np.ndarray]:
    """The toy corpus in three units with random answers, one unit and some documents without any; and the
    positions of the answers."""
    shutil.copytree(corpus_dir, tmp_path / "corpus")
    root = tmp_path / "corpus"
    corpus = open_corpus(root)
    tokens, documents = corpus.tokens(0, corpus.num_tokens), corpus.documents
    random = np.random.default_rng(1)
    is_answer = random.random(corpus.num_tokens) < 0.3
    is_answer[0] = False
    stops = corpus.document_stops
    is_answer[stops[2] : stops[4]] = False  # two documents without an answer
    edges = [0, 2, 5, len(documents)]
    is_answer[stops[1] : stops[4]] = False  # and with them a unit
    folder, units = root / "train", []
    for path in folder.iterdir():
        path.unlink()
    for number, (first, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        start, end = (0 if first == 0 else int(stops[first - 1])), int(stops[stop - 1])
        tokens[start:end].astype(corpus.dtype).tofile(folder / f"tokens-{number:05d}.bin")
        is_answer[start:end].tofile(folder / f"answers-{number:05d}.bin")
        lines = []
        for at in range(first, stop):
            begin = 0 if at == 0 else int(stops[at - 1])
            count = int(is_answer[begin : stops[at]].sum())
            lines.append(json.dumps({**documents[at], "answers": count, "answer_bytes": count}))
        (folder / f"documents-{number:05d}.jsonl").write_text("".join(line + "\n" for line in lines))
        answers = int(is_answer[start:end].sum())
        units.append(
            {"unit": f"{number:05d}", "tokens": end - start, "documents": stop - first, "bytes": 1,
             "unknown": 0, "dropped": 0,
             "answers": answers, "answer_bytes": answers}
        )  # fmt: skip
    manifest = read_sealed_json(root / "manifest.json")
    total = int(is_answer.sum())
    manifest["splits"]["train"] |= {"units": units, "num_answers": total, "num_answer_bytes": total}
    files = [
        {
            "name": f"train/{path.name}",
            "bytes": path.stat().st_size,
            "sha256": sha256_of_file(path),
        }
        for path in sorted(folder.iterdir())
    ]
    manifest |= {"counts": "answers", "files": files}
    publish_json(root / "manifest.json", manifest, seal=True)
    return open_corpus(root), np.flatnonzero(is_answer) - 1


def test_rows_are_the_positions_of_answers_in_order(marked: tuple[CorpusSplit, np.ndarray]) -> None:
    corpus, positions_n = marked
    rows = CountedRows(corpus)
    assert rows.num_rows == corpus.num_counted == len(positions_n)
    for start, stop in ((0, rows.num_rows), (0, 1), (3, 90), (rows.num_rows - 1, rows.num_rows), (5, 5)):
        assert rows.positions(Block(start, stop)).tolist() == positions_n[start:stop].tolist()
        if start < stop:
            span = rows.span(Block(start, stop))
            assert span == Block(int(positions_n[start]), int(positions_n[stop - 1]) + 1)
            offsets_n = rows.offsets(span)
            assert offsets_n is not None
            assert (span.start + offsets_n).tolist() == positions_n[start:stop].tolist()
    with pytest.raises(ValueError, match="are not among"):
        rows.positions(Block(0, rows.num_rows + 1))


def test_rows_of_a_document_are_told_by_brute_force(marked: tuple[CorpusSplit, np.ndarray]) -> None:
    corpus, positions_n = marked
    document_n = corpus.documents_of(positions_n)
    first_n, stop_n = CountedRows(corpus).document_bounds(np.arange(len(positions_n)))
    for row, document in enumerate(document_n):
        same = np.flatnonzero(document_n == document)
        assert (first_n[row], stop_n[row]) == (same[0], same[-1] + 1)


def test_where_all_count_rows_are_positions(corpus_dir: Path) -> None:
    corpus = open_corpus(corpus_dir)
    rows = CountedRows(corpus)
    assert rows.num_rows == corpus.num_positions and rows.offsets(Block(3, 9)) is None
    assert rows.positions(Block(3, 9)).tolist() == list(range(3, 9)) and rows.span(Block(3, 9)) == Block(3, 9)
    some_n = np.arange(0, corpus.num_positions, 7)
    for found, expected in zip(rows.document_bounds(some_n), corpus.document_bounds(some_n), strict=True):
        assert np.array_equal(found, expected)
