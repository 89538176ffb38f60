"""Inputs blended by weight: shares that are reached, the same choice everywhere, and what is said of them."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import SPLITS, open_corpus, read_corpus_manifest
from mlpmem_ds.stages.corpus import prepare_corpus

from .test_prepare_corpus import config_of, result_of


@pytest.fixture
def two_inputs(tmp_path: Path) -> tuple[Path, Path]:
    """A file of 300 short documents, and a folder of 40 longer ones."""
    chosen = random.Random(5)
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        "".join(json.dumps({"text": f"line {n} " * chosen.randint(2, 12)}) + "\n" for n in range(300))
    )
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(f"book {number} " * chosen.randint(50, 150))
    return lines, folder


def run(inputs: tuple[Path, ...], output: Path, world: World | None = None, **changes: Any) -> Path:
    config = config_of(inputs[0], output, input=tuple(map(str, inputs)), heldout_fraction=0.0, **changes)
    prepare_corpus.run(config, world or World())
    return output


def names_in(root: Path) -> list[str]:
    splits = [split for split in SPLITS if (root / split).is_dir()]
    return [document["name"] for split in splits for document in open_corpus(root, split).documents]


def test_shares_are_reached_and_the_scarcest_input_is_whole(
    two_inputs: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    manifest = read_corpus_manifest(run(two_inputs, tmp_path / "corpus", weights=(3.0, 1.0)))
    lines, books = manifest.blend
    assert (lines.weight, books.weight) == (0.75, 0.25)
    assert lines.num_documents == lines.available_documents == 300, "less text for its weight: all of it"
    share = lines.num_bytes / (lines.num_bytes + books.num_bytes)
    assert abs(share - 0.75) < 0.03 and books.num_documents < 40
    names = names_in(tmp_path / "corpus")
    assert len(names) == len(set(names)) == lines.num_documents + books.num_documents, "nothing is repeated"
    for field in ("num_documents", "num_bytes", "num_tokens"):
        for split in SPLITS:
            total = sum(getattr(one.splits[split], field) for one in manifest.blend if split in one.splits)
            assert total == getattr(manifest.splits[split], field)
    assert manifest.left_out["not sampled"] == 40 - books.num_documents
    assert "blended   " in caplog.text and "asked 75.0%, reached 7" in caplog.text


def test_the_choice_is_one_of_names_and_seed(two_inputs: tuple[Path, Path], tmp_path: Path) -> None:
    first = set(names_in(run(two_inputs, tmp_path / "a", weights=(0.5, 0.5), max_bytes=9000.0)))
    again = set(names_in(run(two_inputs[::-1], tmp_path / "b", weights=(2.0, 2.0), max_bytes=9000.0)))
    other = set(names_in(run(two_inputs, tmp_path / "c", weights=(0.5, 0.5), max_bytes=9000.0, seed=4)))
    assert first == again != other
    more = set(names_in(run(two_inputs, tmp_path / "d", weights=(0.5, 0.5), max_bytes=12000.0)))
    assert len(first & more) > 0.9 * len(first), "a larger blend holds nearly all of the smaller"


def test_ranks_give_the_same_bytes(
    two_inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_corpus, "_UNIT_BYTES", 5000)
    one = run(two_inputs, tmp_path / "one", weights=(0.3, 0.7), processes=2)
    for rank in (0, 1):
        run(two_inputs, tmp_path / "two", World(rank=rank, size=2), weights=(0.3, 0.7))
    assert result_of(one) == result_of(tmp_path / "two")
    with pytest.raises(UserError, match="--weights was .*, now"):
        run(two_inputs, one, weights=(0.4, 0.6))


def test_an_input_that_is_too_small_is_told(
    two_inputs: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = read_corpus_manifest(
        run(two_inputs, tmp_path / "corpus", weights=(0.9, 0.1), max_bytes=60000.0)
    )
    assert manifest.blend[0].num_documents == 300
    assert "lines.jsonl reaches" in caplog.text and "nothing is repeated; give it more text" in caplog.text


def test_what_cannot_be_blended_is_refused(two_inputs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").touch()
    with pytest.raises(UserError, match="--weights has 1 numbers for 2 --input"):
        run(two_inputs, tmp_path / "corpus", weights=(1.0,))
    with pytest.raises(UserError, match="--weights must be above 0"):
        run(two_inputs, tmp_path / "corpus", weights=(1.0, 0.0))
    with pytest.raises(UserError, match="the input 3 of 3 holds no text"):
        run((*two_inputs, tmp_path / "empty"), tmp_path / "corpus", weights=(1.0, 1.0, 1.0))
    assert not (tmp_path / "corpus").exists()


def test_shares_that_hold_no_document_are_told_as_shares(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """600 bytes fit in 1000; the 500 of each input do not hold them."""
    inputs = (tmp_path / "a.txt", tmp_path / "b.txt")
    for path in inputs:
        path.write_text(f"{path.name[0]} " * 300)
    with pytest.raises(
        UserError,
        match=r"of --max-bytes 1000 each of the 2 inputs gets a share, .* than each of its documents",
    ):
        run(inputs, tmp_path / "corpus", weights=(0.5, 0.5), max_bytes=1000.0)
    assert not (tmp_path / "corpus").exists() and "split is empty" not in caplog.text
    run(inputs, tmp_path / "corpus", weights=(0.5, 0.5), max_bytes=1200.0)


def test_inputs_with_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    """As the data sets of the Hub have; where the folders have one name too, by those above them."""
    for place in ("wiki/data", "code/data"):
        (tmp_path / place).mkdir(parents=True)
        lines = [json.dumps({"text": f"{place} {n} " * 9}) + "\n" for n in range(20)]
        (tmp_path / place / "train.jsonl").write_text("".join(lines))
    (tmp_path / "wiki" / "data" / "more.txt").write_text("more text " * 20)
    inputs = (tmp_path / "wiki" / "data", tmp_path / "code" / "data")
    names = names_in(run(inputs, tmp_path / "corpus", weights=(0.5, 0.5)))
    assert {name.partition(":")[0] for name in names} >= {
        "wiki/data/train.jsonl",
        "code/data/train.jsonl",
    }
    assert not {name.partition("/")[0] for name in names} - {"wiki", "code"}
