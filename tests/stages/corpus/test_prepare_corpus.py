from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import content_hash
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import SPLITS, open_corpus, read_corpus_manifest
from mlpmem_ds.formats.documents import Document, read_documents
from mlpmem_ds.formats.records import ReadRules
from mlpmem_ds.stages.corpus import prepare_corpus, tokenization, workers
from mlpmem_ds.stages.corpus import survey as corpus_survey
from mlpmem_ds.stages.corpus.prepare_corpus import Config


def result_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "log.jsonl")
    }


def config_of(text_dir: Path, output: Path, **changes: Any) -> Config:
    return replace(
        Config(
            input=(str(text_dir),),
            tokenizer="train:300",
            output=output,
            block_size=32,
            stride=16,
            tuning_fraction=0.15,
            test_fraction=0.15,
            heldout_fraction=0.2,
            seed=3,
        ),
        **changes,
    )


def test_every_document_is_in_one_split_and_decodes_to_its_text(text_dir: Path, corpus_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(corpus_dir / "tokenizer")
    seen: dict[str, str] = {}
    groups: dict[str, set[str]] = {}
    for split in SPLITS:
        corpus = open_corpus(corpus_dir, split)
        starts = [0, *corpus.document_stops[:-1]]
        for document, start, stop in zip(corpus.documents, starts, corpus.document_stops, strict=True):
            text = tokenizer.decode(corpus.tokens(int(start), int(stop) - 1))
            assert text == (text_dir / document["name"]).read_text(encoding="utf-8")
            assert document["bytes"] == len(text.encode())
            assert seen.setdefault(document["name"], split) == split
            groups.setdefault(split, set()).add(document["group"])
    assert set(seen) == {path.relative_to(text_dir).as_posix() for path in text_dir.rglob("*.py")}
    assert not groups["heldout"] & (groups["train"] | groups["tuning"] | groups["test"])


def test_equal_texts_share_a_split(tmp_path: Path, text_dir: Path) -> None:
    shutil.copytree(text_dir, tmp_path / "twice" / "a")
    shutil.copytree(text_dir, tmp_path / "twice" / "b")
    prepare_corpus.run(config_of(tmp_path / "twice", tmp_path / "corpus", heldout_fraction=0.0), World())
    for split in ("train", "tuning", "test"):
        names = [document["name"] for document in open_corpus(tmp_path / "corpus", split).documents]
        assert {name[2:] for name in names if name.startswith("a/")} == {
            name[2:] for name in names if name[0] == "b"
        }


def test_reruns_and_ranks_give_the_same_bytes(
    text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_corpus, "_UNIT_BYTES", 2000)  # several units
    one, two = tmp_path / "one", tmp_path / "two"
    prepare_corpus.run(config_of(text_dir, one), World())
    for rank in (0, 1):  # rank 0 owns the tokenizer, which rank 1 waits for
        prepare_corpus.run(config_of(text_dir, two), World(rank=rank, size=2))
    assert result_of(one) == result_of(two)
    assert len(list((one / "train").glob("tokens-*.bin"))) > 2


def test_a_broken_run_continues_to_the_same_bytes(
    text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_corpus, "_UNIT_BYTES", 2000)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    prepare_corpus.run(config_of(text_dir, straight), World())
    real, calls = tokenization.encode, []

    def fail_at_the_third(encoder: Any, documents: list[Any]) -> list[Any]:
        calls.append(documents)
        if len(calls) == 3:
            raise RuntimeError("killed")
        return real(encoder, documents)

    monkeypatch.setattr(tokenization, "encode", fail_at_the_third)
    with pytest.raises(RuntimeError):
        prepare_corpus.run(config_of(text_dir, broken), World())
    assert not (broken / "manifest.json").exists()
    prepare_corpus.run(config_of(text_dir, broken), World())
    assert result_of(straight) == result_of(broken)


def test_an_existing_tokenizer_is_kept_as_it_is(text_dir: Path, corpus_dir: Path, tmp_path: Path) -> None:
    prepare_corpus.run(
        config_of(text_dir, tmp_path / "again", tokenizer=str(corpus_dir / "tokenizer")), World()
    )
    first, second = open_corpus(corpus_dir), open_corpus(tmp_path / "again")
    assert first.vocabulary_sha256 == second.vocabulary_sha256
    assert first.tokens(0, 100).tolist() == second.tokens(0, 100).tolist()


def test_a_sample_takes_whole_groups_up_to_a_size(text_dir: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in text_dir.rglob("*.py"))
    config = config_of(
        text_dir,
        tmp_path / "part",
        max_bytes=size / 2,
        tuning_fraction=0.0,
        test_fraction=0.0,
        heldout_fraction=0.0,
    )
    prepare_corpus.run(config, World())
    corpus = open_corpus(tmp_path / "part")
    assert size / 3 < corpus.num_bytes <= size / 2


def test_a_limit_of_the_training_text_leaves_the_other_splits_byte_for_byte(
    text_dir: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    tokenizer = str(corpus_dir / "tokenizer")
    prepare_corpus.run(config_of(text_dir, tmp_path / "all", tokenizer=tokenizer), World())
    whole = open_corpus(tmp_path / "all")
    limit = whole.num_bytes / 2
    prepare_corpus.run(
        config_of(text_dir, tmp_path / "part", tokenizer=tokenizer, max_train_bytes=limit), World()
    )
    part = open_corpus(tmp_path / "part")
    assert limit / 2 < part.num_bytes <= limit
    assert {entry["name"] for entry in part.documents} < {entry["name"] for entry in whole.documents}
    for split in ("tuning", "test", "heldout"):
        files = result_of(tmp_path / "all" / split)
        assert files and result_of(tmp_path / "part" / split) == files
    left_out = read_corpus_manifest(tmp_path / "part").left_out
    assert left_out["not sampled"] == len(list(whole.documents)) - len(list(part.documents))


def test_the_survey_in_parts_is_the_whole(
    text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts and units, for files of no, one and many documents whose ends fall on parts' ends and between
    them."""
    (tmp_path / "text").mkdir()
    for number, documents in enumerate((2, 0, 3, 1, 6, 0, 4)):
        lines = "".join(json.dumps({"text": f"{number} {n}"}) + "\n" for n in range(documents))
        (tmp_path / "text" / f"{number}.jsonl").write_text(lines)
    config = config_of(
        tmp_path / "text", tmp_path / "corpus", tuning_fraction=0.0, test_fraction=0.0, heldout_fraction=0.0
    )
    monkeypatch.setattr(prepare_corpus, "_UNIT_BYTES", 9)
    for part in (1, 2, 3, 5, 100):
        monkeypatch.setattr(corpus_survey, "_PART_DOCUMENTS", part)
        units = prepare_corpus._survey(config, World()).units
        assert [unit.counts for unit in units] == [(2, 0, 3), (1, 6), (0, 4)], part
        assert [(unit.first, unit.stop) for unit in units] == [(0, 5), (5, 12), (12, 16)]


def test_a_killed_process_is_told(text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "encode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="one of the 2 processes was killed.*fewer --processes"):
        prepare_corpus.run(config_of(text_dir, tmp_path / "corpus", processes=2), World())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": ("/no/such/path",)}, "does not exist"),
        ({"tokenizer": "/no/such/tokenizer"}, "no such directory"),
        ({"tokenizer": "train:12"}, "at least 257"),
        ({"stride": 0}, "--stride must be at least 1, not 0"),
        ({"stride": 33}, "--block-size 32 must be a multiple of --stride 33"),
        ({"stride": 5}, "multiple"),
        ({"tuning_fraction": 0.9, "test_fraction": 0.2}, "must leave something"),
        ({"max_bytes": 1}, "--max-bytes 1 is less than each of"),
        ({"max_bytes": -1}, "--max-bytes must be above 0, not -1"),
        ({"max_train_bytes": 1}, "--max-train-bytes 1 is less than each of .* leave it out for all of them"),
    ],
)
def test_wrong_inputs_leave_the_disk_untouched(
    text_dir: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare_corpus.run(config_of(text_dir, tmp_path / "corpus", **changes), World())
    assert not (tmp_path / "corpus").exists()


def test_splits_that_are_too_small_to_judge_by_are_told(
    text_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_corpus.run(config_of(text_dir, tmp_path / "split"), World())
    assert "validates" not in caplog.text
    prepare_corpus.run(
        config_of(text_dir, tmp_path / "whole", tuning_fraction=0.0, test_fraction=0.0), World()
    )
    assert "tuning has no document, test has no document" in caplog.text
    assert "--tuning-fraction, such as .05 and --test-fraction, such as .05" in caplog.text
    identity = json.loads((tmp_path / "whole" / "identity.json").read_text())
    assert "include" not in identity["config"]  # the files that it found are in the inputs' hash


def test_another_text_in_the_same_output_is_refused(text_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "text"
    shutil.copytree(text_dir, copy)
    prepare_corpus.run(config_of(copy, tmp_path / "corpus"), World())
    next(copy.rglob("*.py")).write_text("changed")
    with pytest.raises(UserError, match=r"inputs\.text"):
        prepare_corpus.run(config_of(copy, tmp_path / "corpus"), World())


def test_other_groups_of_the_same_texts_are_refused(tmp_path: Path) -> None:
    """They decide what is held out, and are read from the records or from a folder's name."""
    folder = tmp_path / "source=a"
    folder.mkdir()
    lines = [{"text": f"text {n} " * 9, "source": "even" if n % 2 else "odd"} for n in range(40)]

    def write(records: list[dict[str, str]]) -> None:
        (folder / "lines.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def prepare(text: Path, name: str) -> None:
        prepare_corpus.run(config_of(text, tmp_path / name, group_field="source"), World())

    write(lines)
    prepare(folder, "named")
    prepare(folder, "named")
    write([{**line, "source": lines[n ^ 1]["source"]} for n, line in enumerate(lines)])
    with pytest.raises(UserError, match=r"inputs\.groups"):
        prepare(folder, "named")
    write([{"text": line["text"]} for line in lines])
    prepare(folder, "above")
    with pytest.raises(UserError, match=r"inputs\.groups"):
        prepare(folder.rename(tmp_path / "source=b"), "above")


def test_processes_give_the_same_bytes(
    text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_corpus, "_UNIT_BYTES", 2000)
    # several batches a unit, more than are ahead of the writer; several tasks of the survey, in parts
    monkeypatch.setattr(tokenization, "BATCH_BYTES", 300)
    monkeypatch.setattr(corpus_survey, "_GROUP_BYTES", 900)
    monkeypatch.setattr(corpus_survey, "_PART_DOCUMENTS", 3)
    texts = tmp_path / "texts"
    shutil.copytree(text_dir, texts)
    (texts / "many.jsonl").write_text(
        "".join(json.dumps({"text": f"line {n} " * 9}) + "\n" for n in range(40))
    )
    (texts / "empty.txt").write_text(" \n")
    (texts / "binary.txt").write_bytes(b"\xff\xfe")
    for sample in (None, 4000.0):  # all of it; and a part, so that files are passed over
        one, three = (tmp_path / f"{count}-{sample}" for count in ("one", "three"))
        prepare_corpus.run(config_of(texts, one, max_bytes=sample), World())
        prepare_corpus.run(config_of(texts, three, max_bytes=sample, processes=3), World())
        assert result_of(one) == result_of(three)
        names = {
            document["name"]
            for split in SPLITS
            if (one / split).is_dir()
            for document in open_corpus(one, split).documents
        }
        assert {"many.jsonl:7", "many.jsonl:40"} <= names or sample
        assert not names & {"empty.txt", "binary.txt"}
    assert workers.choose_processes(None, World(), 1 << 30) >= 1
    assert workers.choose_processes(None, World(), 1000) == 1
    assert workers.choose_processes(None, World(rank=1, size=2), 1 << 30) == 1
    assert workers.choose_processes(5, World(rank=1, size=2), 1000) == 5


def test_an_error_in_a_worker_reaches_the_user(
    text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(encoder: Any, documents: list[Any]) -> list[Any]:
        raise RuntimeError("in the worker")

    monkeypatch.setattr(tokenization, "encode", fail)  # a forked worker has it too
    with pytest.raises(RuntimeError, match="in the worker"):
        prepare_corpus.run(config_of(text_dir, tmp_path / "corpus", processes=2), World())
    assert not (tmp_path / "corpus" / "manifest.json").exists()


def test_the_surveys_hash_is_that_of_the_whole_list(text_dir: Path, tmp_path: Path) -> None:
    config = config_of(text_dir, tmp_path / "corpus", group_field=None)
    survey = prepare_corpus._survey(config, World())
    files = [file for unit in survey.units for file in unit.files]
    documents = [document for file in files for document in read_documents(file, ReadRules())]
    assert survey.groups_sha256 is None
    named = prepare_corpus._survey(replace(config, group_field="any"), World())
    groups = [document.group for document in documents if isinstance(document, Document)]
    assert named.groups_sha256 == content_hash(groups)
    assert survey.sha256 == content_hash(
        [[document.name, document.sha256] for document in documents if isinstance(document, Document)]
    )
    assert survey.num_bytes == sum(path.stat().st_size for path in text_dir.rglob("*.py"))
    listed = corpus_survey._ListHash()
    for entries in (b"", listed.pair("a", "1").encode(), b"", listed.pair("b\u00e4", "2").encode()):
        listed.extend(entries)
    assert listed.hexdigest() == content_hash([["a", "1"], ["b\u00e4", "2"]])
    empty = corpus_survey._ListHash()
    assert empty.hexdigest() == content_hash([])


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x.jsonl", lambda path: path.write_text('{"text": "a b c"}\n' * 19)),
        ("x.jsonl", lambda path: path.write_text('{"text": "a b d"}\n' * 20)),
        ("x.jsonl", lambda path: path.write_text('{"text": "a b c"}\n' * 21)),
        ("x.txt", lambda path: path.write_text("\n")),
        ("x.txt", lambda path: path.write_text(path.read_text().replace("c", "d"))),
        ("x.txt", lambda path: path.write_bytes(b"\xff")),
        ("x.txt", Path.unlink),
    ],
)
def test_an_input_that_changes_meanwhile_is_refused(
    name: str,
    change: Callable[[Path], Any],
    processes: int,
    text_dir: Path,
    tmp_path: Path,
    corpus_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changing = tmp_path / "text" / name
    shutil.copytree(text_dir, changing.parent)
    changing.write_text('{"text": "a b c"}\n' * 20 if name == "x.jsonl" else "a b c\n" * 20)
    survey_files = prepare_corpus.survey_files

    def survey_and_change(*arguments: Any, **others: Any) -> Any:
        survey = survey_files(*arguments, **others)
        change(changing)
        return survey

    monkeypatch.setattr(prepare_corpus, "survey_files", survey_and_change)
    tokenizer = str(corpus_dir / "tokenizer")
    with pytest.raises(
        UserError, match=rf"{name}.*changed while it was read|changed while it was read.*{name}"
    ):
        prepare_corpus.run(
            config_of(changing.parent, tmp_path / "corpus", tokenizer=tokenizer, processes=processes), World()
        )
    assert not (tmp_path / "corpus" / "manifest.json").exists()


@pytest.mark.parametrize("exchange", ["none", "files"])
def test_ranks_write_nothing_into_a_directory_that_holds_something_else(
    text_dir: Path, tmp_path: Path, exchange: str
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    config = config_of(text_dir, tmp_path, exchange=exchange)
    with pytest.raises(UserError, match="is not empty"):
        prepare_corpus.run(config, World(rank=1, size=2))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_long_documents_are_cut_into_more_documents(text_dir: Path, tmp_path: Path) -> None:
    config = config_of(text_dir, tmp_path / "corpus", cut_documents=500)
    prepare_corpus.run(config, World())
    found = [line for split in SPLITS for line in _listed(tmp_path / "corpus", split)]
    assert any(", piece 2" in line["name"] for line in found)
    assert len(found) > len(list(text_dir.rglob("*.py")))


def test_long_documents_are_shortened(text_dir: Path, tmp_path: Path) -> None:
    config = config_of(text_dir, tmp_path / "corpus", shorten_documents=500)
    prepare_corpus.run(config, World())
    found = [line for split in SPLITS for line in _listed(tmp_path / "corpus", split)]
    assert len(found) == len([path for path in text_dir.rglob("*.py") if path.read_text().strip()])
    assert max(line["bytes"] for line in found) <= 550  # characters of one byte, with a few of two
    left_out = (tmp_path / "corpus" / "left_out.jsonl").read_text().splitlines()
    assert "shortened" in {json.loads(line)["reason"] for line in left_out}


def test_cutting_and_shortening_at_once_is_refused(text_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give one of them"):
        config_of(text_dir, tmp_path, cut_documents=500, shorten_documents=500)


def _listed(corpus: Path, split: str) -> list[dict[str, Any]]:
    lists = sorted((corpus / split).glob("documents-*.jsonl"))
    return [json.loads(line) for path in lists for line in path.read_text().splitlines()]
