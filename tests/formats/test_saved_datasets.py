"""Data sets of `datasets`, saved and streamed: every document is read, or what is wrong is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.input_files import find_files
from mlpmem_ds.formats.saved_datasets import is_saved_dataset

pyarrow = pytest.importorskip("pyarrow")
from .toy_documents import EXPECTED, RECORDS, documents_of, write_saved_dataset  # noqa: E402


def test_splits_of_a_saved_dataset_and_a_missing_file(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_saved_dataset(tmp_path / "both" / split)
    (tmp_path / "both" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    names = [file.name for file in find_files([str(tmp_path / "both")], None, ()).files]
    assert names == [
        f"{split}/data-0000{number}-of-00002.arrow" for split in ("train", "test") for number in range(2)
    ]
    assert documents_of(tmp_path / "both") == EXPECTED * 2
    (tmp_path / "both" / "test" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match="without its file data-00001"):
        documents_of(tmp_path / "both")
    (tmp_path / "both" / "test" / "state.json").unlink()
    with pytest.raises(UserError, match="without its split test"):
        documents_of(tmp_path / "both")
    (tmp_path / "both" / "dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match="list of files cannot be read"):
        documents_of(tmp_path / "both")


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is not needed to test what we ask of it."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, configuration: str | None, **rest: Any) -> list[dict[str, Any]]:
        asked.append((name, configuration, rest))
        return RECORDS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert documents_of("datasets:org/name:wikitext-103:test") == EXPECTED
    assert documents_of("datasets:org/name") == EXPECTED
    assert asked == [
        ("org/name", "wikitext-103", {"split": "test", "streaming": True}),
        ("org/name", None, {"split": "train", "streaming": True}),
    ]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        documents_of("datasets:org/name")


def test_other_programs_folders_are_no_data_sets(tmp_path: Path) -> None:
    """A training's state, a list that is no list of files: ordinary folders."""
    contents = {
        "trainer/state.json": '{"global_step": 3}',
        "list/state.json": "[1, 2]",
        "broken/state.json": '{"epoch": ',
        "deep/state.json": "[" * 100_000,
        "huge/state.json": "1" * 5000,
        "dict/dataset_dict.json": '{"languages": ["de"]}',
        "dict_of_lists/dataset_dict.json": "[]",
        "splits_alone/dataset_dict.json": '{"splits": ["train"]}',
        "none/other.json": "{}",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
        assert not is_saved_dataset(tmp_path / name.partition("/")[0]), name


def test_a_damaged_list_of_files_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    write_saved_dataset(tmp_path / "one")
    whole = (tmp_path / "one" / "state.json").read_text()
    for content in (whole[:-9], "", '{"_data_files": 7}', '{"_data_files": [{}]}', '{"_data_files": null}'):
        (tmp_path / "one" / "state.json").write_text(content)
        with pytest.raises(UserError, match="list of files cannot be read .*save or copy it again"):
            documents_of(tmp_path / "one")


def test_rows_in_another_order_than_stored_are_refused(tmp_path: Path) -> None:
    """Before version 2, a data set could be saved with indices into its rows."""
    write_saved_dataset(tmp_path / "one")
    state = json.loads((tmp_path / "one" / "state.json").read_text())
    for name in ("_indices_data_files", "_indices_files"):
        (tmp_path / "one" / "state.json").write_text(
            json.dumps({**state, name: [{"filename": "indices.arrow"}]})
        )
        with pytest.raises(UserError, match="flatten_indices"):
            documents_of(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text(json.dumps({**state, "_indices_data_files": None}))
    assert documents_of(tmp_path / "one") == EXPECTED


def test_what_a_selection_leaves_as_it_was_does_not_count(tmp_path: Path) -> None:
    """`select` and `filter` keep the first data set's number of rows; a format hides columns, not rows; a
    cache of later work may lie next to the data."""
    write_saved_dataset(tmp_path / "one")
    state = json.loads((tmp_path / "one" / "state.json").read_text())
    (tmp_path / "one" / "state.json").write_text(json.dumps({**state, "_format_columns": ["author"]}))
    (tmp_path / "one" / "dataset_info.json").write_text('{"splits": {"train": {"num_examples": 9999}}}')
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"something else")
    assert documents_of(tmp_path / "one") == EXPECTED


def test_a_part_that_was_cut_between_two_batches_is_refused(tmp_path: Path) -> None:
    write_saved_dataset(tmp_path / "one")
    part = tmp_path / "one" / "data-00001-of-00002.arrow"
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(UserError, match="data-00001-of-00002.arrow .*no end-of-stream mark"):
        documents_of(tmp_path / "one")


def test_what_the_package_cannot_load_is_one_readable_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, configuration: str | None, **rest: Any) -> Iterator[dict[str, Any]]:
        if name == "org/none":
            raise FileNotFoundError("Couldn't find\n  org/none")
        if rest["split"] != "train[:10]":
            raise ValueError(f"Bad split: {rest['split']}. Available splits: ['train']")
        yield {"text": "a", "author": "A"}
        raise ConnectionError

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for given, message in (
        ("datasets:org/none", "FileNotFoundError: Couldn't find org/none.: check the name"),
        ("datasets:org/name::tests", "Bad split: tests. Available splits"),
        ("datasets:org/name::train[:10]", "read on .ConnectionError: ConnectionError.*network"),
        ("datasets::config", "names no data set"),
        ("datasets:org/name:config:", "names no data set"),
    ):
        with pytest.raises(UserError, match=message) as found:
            documents_of(given)
        assert "\n" not in str(found.value)
    with pytest.raises(UserError, match=r"row 0 is not an object .*it has text, author"):
        documents_of("datasets:org/name::train[:10]", text_field="body")


def found(root: Path, include: tuple[str, ...] | None = None, exclude: tuple[str, ...] = ()) -> Any:
    """(names of the files, (name, reason) of what is left out)."""
    given = find_files([str(root)], include, exclude)
    return [file.name for file in given.files], [(one.name, one.reason) for one in given.omissions]


def test_a_data_set_below_the_input_is_read_as_one(tmp_path: Path) -> None:
    """In its order and without what lies next to it, which is named."""
    for split in ("train", "test"):
        write_saved_dataset(tmp_path / "b" / "both" / split)
    (tmp_path / "b" / "both" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    write_saved_dataset(tmp_path / "b" / "one")
    (tmp_path / "b" / "one" / "README.md").write_text("about it")
    (tmp_path / "b" / "one" / "more").mkdir()
    (tmp_path / "b" / "both" / "test" / "cache-0123456789abcdef.arrow").write_text("")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "c.txt").write_text("c")
    parts = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    of_both = [f"b/both/{split}/{part}" for split in ("train", "test") for part in parts]
    of_one = [f"b/one/{part}" for part in parts]
    beside = [
        ("b/both/test/cache-0123456789abcdef.arrow", "data set cache"),
        ("b/one/README.md", "next to a data set"),
        ("b/one/more/", "next to a data set"),
    ]
    assert found(tmp_path) == (["a.txt", *of_both, *of_one, "c.txt"], beside)
    assert found(tmp_path / "b" / "one") == (parts, [("README.md", beside[1][1]), ("more/", beside[2][1])])
    names, left_out = found(tmp_path, ("*.txt",))
    assert names == ["a.txt", "c.txt"]
    assert left_out[:4] == [(name, "not included") for name in of_both]
    assert found(tmp_path, ("b/one/*.arrow",))[0] == of_one
    names, left_out = found(tmp_path, exclude=("test", "README.md"))
    assert names == ["a.txt", *of_both[:2], *of_one, "c.txt"]
    assert ("b/one/README.md", "excluded") in left_out and (of_both[2], "excluded") in left_out
    assert documents_of(tmp_path / "b", group_field="author") == EXPECTED * 3
    (tmp_path / "b" / "one" / parts[1]).unlink()
    with pytest.raises(UserError, match="without its file data-00001"):
        documents_of(tmp_path)
