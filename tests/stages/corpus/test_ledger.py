"""What of the inputs was left out is said, kept in the corpus, and with `--strict` refused."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.manifest import CompleteStage, read_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import CorpusManifest, SourceCounts, open_corpus
from mlpmem_ds.stages.corpus import prepare_corpus, shared_survey

from .test_prepare_corpus import config_of, result_of


@pytest.fixture
def mixed_dir(text_dir: Path, tmp_path: Path) -> Path:
    """Texts next to much that is none."""
    root = tmp_path / "mixed"
    root.mkdir()
    for number, path in enumerate(sorted(text_dir.rglob("*.py"))):
        (root / f"{number}.txt").write_bytes(path.read_bytes())
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "empty.txt").touch()
    (root / "marked.txt").write_bytes(b"\xef\xbb\xbfa text with a mark")
    (root / os.fsdecode(b"caf\xe9.txt")).write_text("a name that is not UTF-8")
    (root / "x.log").write_text("a log")
    (root / "photo.jpg").write_text("an image")
    (root / "lines.jsonl").write_text(
        '{"text": "one"}\n{"text": null}\n{"text": " "}\n{"text": "two\\u2028"}\n'
    )
    (root / "gone.txt").symlink_to("nowhere")
    return root


LEFT_OUT = {"empty": 3, "not text": 1, "unknown name": 1, "encoding": 1, "broken link": 1}


def manifest_of(root: Path) -> CorpusManifest:
    stage: CompleteStage[CorpusManifest] = read_stage(CompleteStage, CorpusManifest, root, flag="--corpus")
    return stage.manifest


def test_what_was_left_out_is_said_counted_and_listed(
    mixed_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    prepare_corpus.run(config_of(mixed_dir, tmp_path / "out"), World())
    manifest, num_texts = manifest_of(tmp_path / "out"), len(list(mixed_dir.glob("[0-9]*.txt")))
    assert manifest.left_out == LEFT_OUT
    assert manifest.sources == {
        "json": SourceCounts(files=1, documents=2),
        "text": SourceCounts(files=num_texts + 3, documents=num_texts + 2),
    }
    listed = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().split("\n")[:-1]]
    assert [(entry["name"], entry["reason"], entry["count"]) for entry in listed] == [
        ("gone.txt", "broken link", 1),
        ("photo.jpg", "not text", 1),
        ("x.log", "unknown name", 1),
        ("empty.txt", "empty", 1),
        ("latin.txt", "encoding", 1),
        ("lines.jsonl:2", "empty", 2),
    ]
    said = [record.getMessage() for record in caplog.records]
    assert "read      json: 1 files, 2 documents" in said
    (line,) = (line for line in said if "not text in UTF-8" in line)
    assert line.startswith(
        "left out  files that are not text in UTF-8, or in the --encoding that was given: 1 (latin.txt); --"
    )
    names = {document["name"] for name in ("train", "tuning", "test", "heldout")
             for document in open_corpus(tmp_path / "out", name).documents}  # fmt: skip
    assert r"caf\xe9.txt" in names and "lines.jsonl:4" in names


def test_ranks_and_reruns_list_the_same(
    mixed_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_survey, "_MIN_CHUNK_BYTES", 2000)
    prepare_corpus.run(config_of(mixed_dir, tmp_path / "one"), World())
    prepare_corpus.run(config_of(mixed_dir, tmp_path / "one"), World())
    two = config_of(mixed_dir, tmp_path / "two")
    prepare_corpus._survey(two, World(rank=1, size=2))  # killed after its share
    for rank in (1, 0):
        prepare_corpus.run(two, World(rank=rank, size=2))
    assert result_of(tmp_path / "one") == result_of(tmp_path / "two")
    assert len(result_of(tmp_path / "two")["left_out.jsonl"].splitlines()) == 6


def test_a_rerun_tells_that_other_files_are_left_out_now(
    mixed_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, told = config_of(mixed_dir, tmp_path / "out"), "what the inputs leave out has changed"
    for _ in range(2):
        prepare_corpus.run(config, World())
    assert told not in caplog.text
    before = result_of(tmp_path / "out")
    (mixed_dir / "y.log").write_text("one more log")
    prepare_corpus.run(config, World())
    assert told in caplog.text
    assert result_of(tmp_path / "out") == before


def test_an_output_within_the_input_is_never_read(
    mixed_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_corpus.run(config_of(mixed_dir, tmp_path / "apart"), World())
    monkeypatch.chdir(mixed_dir)
    for _ in range(2):
        prepare_corpus.run(config_of(Path("."), Path("out/corpus")), World())
    for rank in (0, 1):
        prepare_corpus.run(config_of(mixed_dir, mixed_dir / "two"), World(rank=rank, size=2))
    apart, within = result_of(tmp_path / "apart"), result_of(mixed_dir / "out" / "corpus")
    assert apart == within
    listed = (mixed_dir / "two" / "left_out.jsonl").read_text()
    assert '"out/corpus/", "reason": "own output"' in listed  # of another run
    assert apart["train/tokens-00000.bin"] == (mixed_dir / "two/train/tokens-00000.bin").read_bytes()


def test_strict_refuses_what_may_hold_text_before_anything_is_written(
    mixed_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        prepare_corpus.run(config_of(mixed_dir, tmp_path / "out", strict=True), World())
    for words in ("--strict", "latin.txt", "x.log", "gone.txt", "--encoding", "--exclude"):
        assert words in str(caught.value)
    assert "photo.jpg" not in str(caught.value) and "empty.txt" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    config = config_of(
        mixed_dir, tmp_path / "out", strict=True, exclude=("*.log", "gone*", "latin*"), max_bytes=3000.0
    )
    prepare_corpus.run(config, World())
    left_out = manifest_of(tmp_path / "out").left_out
    assert left_out["excluded"] == 3 and left_out["not sampled"] > 0


def test_an_encoding_reads_what_is_not_utf8_and_binds_the_output(mixed_dir: Path, tmp_path: Path) -> None:
    config = config_of(
        mixed_dir, tmp_path / "out", encoding="LATIN1", strict=True, exclude=("*.log", "gone*")
    )
    prepare_corpus.run(config, World())
    assert "encoding" not in manifest_of(tmp_path / "out").left_out
    prepare_corpus.run(replace(config, encoding="iso-8859-1"), World())
    with pytest.raises(UserError, match="--encoding was 'iso8859-1', now 'cp1252'"):
        prepare_corpus.run(replace(config, encoding="cp1252"), World())
    for wrong in ("nonsense", "rot13", ""):
        with pytest.raises(UserError, match="--encoding.*latin-1"):
            replace(config, encoding=wrong)


def test_empty_words_are_refused(text_dir: Path, tmp_path: Path) -> None:
    config = config_of(text_dir, tmp_path / "out")
    for flag in ("input", "include", "exclude"):
        with pytest.raises(UserError, match=f"--{flag} has an empty value"):
            replace(config, **{flag: ("a", "")})


def test_inputs_without_any_text_are_refused_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "in" / "b.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"hold no text; left out:.*1 \(b.txt\).*1 \(a.txt\); --encoding"):
        prepare_corpus.run(config_of(tmp_path / "in", tmp_path / "out"), World())


def test_files_of_one_name_are_both_named(tmp_path: Path) -> None:
    """Their folders tell `a/x.txt` and `b/x.txt` apart, but `c` holds an `a/x.txt` too."""
    for name in ("a/x.txt", "b/x.txt", "c/a/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    config = config_of(tmp_path, tmp_path / "out", input=tuple(str(tmp_path / name) for name in "abc"))
    with pytest.raises(UserError, match=r"same name 'a/x.txt' \(.*/a/x.txt and .*/c/a/x.txt\)"):
        prepare_corpus.run(config, World())
