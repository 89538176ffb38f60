"""Several ranks read each input once between them to survey it, and find what one rank finds."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.scale.counted_calls import counted_calls
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.documents import SourceFile
from mlpmem_ds.stages.corpus import prepare_corpus, shared_survey
from mlpmem_ds.stages.corpus.prepare_corpus import Config
from mlpmem_ds.stages.corpus.shared_survey import chunks_of

from .test_prepare_corpus import config_of, result_of


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_survey, "_MIN_CHUNK_BYTES", 3000)
    monkeypatch.setattr(prepare_corpus, "_UNIT_BYTES", 2000)


def survey(config: Config, rank: int, size: int) -> tuple[str, dict[str, int]]:
    """The hash of the text, and what this rank opens of it, by file."""
    with counted_calls(Path(config.input[0])) as calls:
        found = prepare_corpus._survey(config, World(rank=rank, size=size))
    return found.sha256, dict(calls)


@pytest.mark.usefixtures("small_chunks")
def test_ranks_survey_each_file_once_between_them(text_dir: Path, tmp_path: Path, corpus_dir: Path) -> None:
    texts, tokenizer = tmp_path / "texts", str(corpus_dir / "tokenizer")
    texts.mkdir()
    for number, path in enumerate(sorted(text_dir.rglob("*.py"))):
        (texts / f"{number}-{path.name}").write_bytes(path.read_bytes())
    odd = [{"text": f"line {number}\0\n\u2028“{number}”"} for number in range(9)]
    (texts / "9999-lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in odd))
    alone = config_of(texts, tmp_path / "alone", tokenizer=tokenizer)
    prepare_corpus.run(alone, World())
    together = config_of(texts, tmp_path / "together", tokenizer=tokenizer)
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("fork")) as ranks:
        found = list(ranks.map(survey, [together] * 3, range(3), [3] * 3))
    assert {sha256 for sha256, _ in found} == {survey(alone, 0, 1)[0]}
    for name in {path.name.partition("-")[0] for path in texts.iterdir()}:
        assert sum(calls.get(name, 0) for _, calls in found) == 1, name
    for rank in (2, 0, 1):
        prepare_corpus.run(together, World(rank=rank, size=3))
    assert result_of(tmp_path / "together") == result_of(tmp_path / "alone")
    assert not list((tmp_path / "together").glob(".*"))


@pytest.mark.usefixtures("small_chunks")
def test_a_start_after_a_kill_does_not_survey_again(text_dir: Path, tmp_path: Path, corpus_dir: Path) -> None:
    config = config_of(text_dir, tmp_path / "out", tokenizer=str(corpus_dir / "tokenizer"))
    prepare_corpus._survey(config, World(rank=0, size=2))
    with counted_calls(text_dir) as calls:
        prepare_corpus._survey(config, World(rank=1, size=2))
    assert calls["opens"] == 0
    changed = next(iter(text_dir.rglob("*.py")))
    content = changed.read_bytes()
    changed.write_bytes(content)  # another time: its chunk is read again
    with counted_calls(text_dir) as calls:
        prepare_corpus._survey(config, World(rank=1, size=2))
    assert 0 < calls["opens"] < len(list(text_dir.rglob("*.py")))


def test_chunks_are_cut_by_bytes_and_keep_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_survey, "_MIN_CHUNK_BYTES", 10)
    files = []
    for number in range(40):
        path = tmp_path / f"{number:02d}.txt"
        path.write_text("x" * 5)
        files.append(SourceFile(path=path, name=path.name, is_named=False))
    chunks = chunks_of(files, 2)
    assert [file for chunk in chunks for file in chunk] == files and len(chunks) == 8
    assert chunks_of([], 2) == []


@pytest.mark.usefixtures("small_chunks")
def test_a_group_of_a_folder_that_was_renamed_is_read_anew(tmp_path: Path) -> None:
    """The files below it stay as they are."""
    folder = tmp_path / "source=a"
    folder.mkdir()
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(9)))

    def groups(text: Path) -> str | None:
        config = config_of(text, tmp_path / "out", group_field="source")
        return prepare_corpus._survey(config, World(rank=0, size=2)).groups_sha256

    assert groups(folder) != groups(folder.rename(tmp_path / "source=b"))
