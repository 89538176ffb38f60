"""Documents that nearly repeat others, planted: found, reported, removed, also across splits and ranks."""

from __future__ import annotations

import json
import logging
import random
from array import array
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.minhash import SignatureRules
from mlpmem_ds.formats.corpus import SPLITS, open_corpus, read_corpus_manifest
from mlpmem_ds.stages.corpus import prepare_corpus
from mlpmem_ds.stages.corpus import survey as corpus_survey
from mlpmem_ds.stages.corpus.near_duplicates import (
    NearDuplicateRules,
    Repetition,
    check_what_is_left,
    leave_out,
)

from .test_prepare_corpus import config_of, result_of

pytest.importorskip("datasketch")
NUM_TEXTS, NUM_COPIES = 60, 20


def words(count: int, seed: int) -> list[str]:
    chosen = random.Random(seed)
    syllables = [vowel + consonant for vowel in "aeiou" for consonant in "bdgklmnprst"]
    return ["".join(chosen.choices(syllables, k=2)) for _ in range(count)]


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """60 unrelated texts, and a copy of 20 of them in which 1 word in 100 is another."""
    root = tmp_path / "planted"
    root.mkdir()
    chosen = random.Random(9)
    for number in range(NUM_TEXTS):
        text = words(300, number)
        (root / f"m{number:02d}.txt").write_text(" ".join(text))
        if number < NUM_COPIES:
            for _ in range(3):
                text[chosen.randrange(300)] = "changed"
            # before and after the original in the order of names
            (root / f"{'az'[number % 2]}{number:02d}.txt").write_text("\n".join(text))
    return root


def names_in(root: Path) -> dict[str, str]:
    """Document → split."""
    splits = [split for split in SPLITS if (root / split).is_dir()]
    return {document["name"]: split for split in splits for document in open_corpus(root, split).documents}


def run(planted: Path, output: Path, **changes: Any) -> Path:
    prepare_corpus.run(config_of(planted, output, **{"heldout_fraction": 0.0, **changes}), World())
    return output


def test_planted_copies_are_removed_and_nothing_else(planted: Path, tmp_path: Path) -> None:
    all_of = names_in(run(planted, tmp_path / "keep"))
    kept = names_in(run(planted, tmp_path / "remove", near_duplicates="remove"))
    assert len(all_of) == NUM_TEXTS + NUM_COPIES
    assert len(kept) == NUM_TEXTS, "recall on planted copies, and nothing unrelated is gone"
    assert {name[1:] for name in kept} == {name[1:] for name in all_of}
    assert all(kept[name] == all_of[name] for name in kept), "no document changes its split"
    leaks = 0
    for number in range(NUM_COPIES):
        pair = [f"m{number:02d}.txt", f"{'az'[number % 2]}{number:02d}.txt"]
        (left,) = [name for name in pair if name not in kept]
        (stays,) = [name for name in pair if name in kept]
        if all_of[left] == all_of[stays]:
            assert stays < left, "within a split the first by name stays"
        else:
            order = ("test", "heldout", "tuning", "train")
            assert order.index(all_of[stays]) < order.index(all_of[left])
            leaks += 1
    assert leaks, "some pairs were parted by the splits"
    lines = [json.loads(line) for line in (tmp_path / "remove" / "left_out.jsonl").read_text().splitlines()]
    listed = {line["name"]: line["detail"] for line in lines if line["reason"] == "near duplicate"}
    assert set(listed) == set(all_of) - set(kept) and set(listed.values()) <= set(kept)
    manifest = read_corpus_manifest(tmp_path / "remove")
    found = manifest.near_duplicates
    assert found is not None and found.are_removed and found.num_documents == NUM_COPIES
    assert manifest.left_out["near duplicate"] == NUM_COPIES
    assert sum(number for split, others in found.between.items() for of, number in others.items()
               if split != of) == leaks  # fmt: skip


def test_a_report_changes_no_token(planted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keep, report = run(planted, tmp_path / "keep"), run(planted, tmp_path / "r", near_duplicates="report")
    one, other = result_of(keep), result_of(report)
    own = {"manifest.json", "identity.json", "near_duplicates.jsonl"}
    assert {name for name in other if not name.startswith("done/")} - own == {
        name for name in one if not name.startswith("done/")
    } - own
    assert all(one[name] == other[name] for name in one if name not in own and not name.startswith("done/"))
    found = read_corpus_manifest(report).near_duplicates
    assert found is not None and found.num_documents == NUM_COPIES and not found.are_removed
    assert "repeated  20 documents" in caplog.text and "of train repeat" in caplog.text
    lines = [json.loads(line) for line in (report / "near_duplicates.jsonl").read_text().splitlines()]
    assert len(lines) == NUM_COPIES and all(line["similarity"] >= 0.8 for line in lines)


def test_ranks_and_processes_give_the_same_bytes(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_corpus, "_UNIT_BYTES", 9000)
    monkeypatch.setattr(corpus_survey, "_GROUP_BYTES", 5000)
    monkeypatch.setattr(corpus_survey, "_PART_DOCUMENTS", 3)
    one, two = tmp_path / "one", tmp_path / "two"
    run(planted, one, near_duplicates="remove", processes=3)
    for rank in (0, 1):
        prepare_corpus.run(
            config_of(planted, two, heldout_fraction=0.0, near_duplicates="remove"), World(rank=rank, size=2)
        )
    assert result_of(one) == result_of(two)


def test_a_training_split_that_would_lose_every_document_is_refused(tmp_path: Path) -> None:
    """Versions of one document: that in the test split stays, and all others repeat it."""
    root, output = tmp_path / "versions", tmp_path / "corpus"
    root.mkdir()
    for number in range(10):
        (root / f"v{number}.txt").write_text(" ".join([*words(300, 0)[:-1], f"version{number}"]))
    changes = {"tuning_fraction": 0.0, "test_fraction": 0.2, "near_duplicate_threshold": 0.9}
    with pytest.raises(
        UserError,
        match=r"--near-duplicates remove takes all documents of the training split \(8\): each is at least"
        r" --near-duplicate-threshold 0\.9 like .* higher threshold, or --near-duplicates report",
    ):
        run(root, output, near_duplicates="remove", **changes)
    assert not output.exists()
    run(root, output, near_duplicates="report", **changes)


def test_a_split_that_loses_every_document_is_told(caplog: pytest.LogCaptureFixture) -> None:
    of = {split: SPLITS.index(split) for split in SPLITS}
    split_of = array("b", [of["train"], of["tuning"], of["tuning"], of["test"], of["train"]])
    repetitions = [
        Repetition(
            number=number,
            name=f"{number}",
            split=SPLITS[split_of[number]],
            kept_name="3",
            kept_split="test",
            similarity=1.0,
            num_bytes=9,
        )
        for number in (0, 1, 2)
    ]
    list(leave_out(repetitions, split_of))
    rules = NearDuplicateRules(
        mode="remove", threshold=0.8, signatures=SignatureRules(words=5, hashes=128, seed=0)
    )
    check_what_is_left(repetitions, split_of, rules)
    (record,) = caplog.records
    assert (
        "the tuning split is empty, because --near-duplicates remove takes all its documents (2)"
        in record.getMessage()
    )


def test_settings_that_are_not_used_are_told(
    planted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(planted, tmp_path / "keep", near_duplicate_words=7)
    assert "--near-duplicate-words is not used" in caplog.text
    with pytest.raises(UserError, match="--near-duplicate-threshold must be"):
        config_of(planted, tmp_path / "x", near_duplicate_threshold=1.5)
