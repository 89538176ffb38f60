"""Lists of files: in the manifest up to 10,000, above that read when a file of theirs is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.scale.counted_calls import counted_calls
from mlpmem_ds.core import file_lists
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.file_lists import LISTS_KEY, Files, files_of, list_files
from mlpmem_ds.core.files import FileRecord


def records_of(count: int) -> list[FileRecord]:
    """Two kinds of files in folders of a thousand, in the order of their units."""
    return [
        FileRecord(name=f"{kind}/{unit // 1000:04d}/{kind}-{unit:06d}", bytes=unit, sha256=f"{unit:064d}")
        for unit in range(count // 2)
        for kind in ("keys", "values")
    ]


def test_up_to_ten_thousand_files_stand_in_the_manifest(tmp_path: Path) -> None:
    records = records_of(10_000)
    named = list_files(tmp_path, records)
    assert named.keys() == {"files"} and not list(tmp_path.iterdir())
    files = files_of(named, tmp_path)
    assert list(files) == records and len(files) == 10_000
    assert files.find("keys/0001/keys-001234") == records[2468] and files.find("keys") is None


def test_more_are_found_through_lists_of_a_thousand(tmp_path: Path) -> None:
    records = records_of(12_002)
    named = list_files(tmp_path, records)
    assert named["files"] == [] and len(named[LISTS_KEY]) == 13
    with counted_calls(tmp_path) as calls:
        files = files_of(named, tmp_path)
        assert len(files) == 12_002 and files.num_bytes == sum(record.bytes for record in records)
        assert calls["opens"] == 0  # nothing is read before it is asked for
        for record in (records[0], records[1], records[-1]):
            assert files.find(record.name) == record
        assert files.find("a") is None and files.find("keys/0001/") is None and files.find("z") is None
    assert calls["opens"] <= 10
    assert sorted(files, key=lambda file: file.name) == sorted(records, key=lambda file: file.name)
    values = list(files.starting_with("values/"))
    assert [file.name for file in values] == [file.name for file in records if file.name[0] == "v"]
    assert list(files.starting_with("values/0003/values-003001")) == [records[6003]]
    assert list(files.starting_with("w")) == [] == list(files.starting_with("a"))


def test_of_few_files_all_are_checked_and_of_many_some(tmp_path: Path) -> None:
    few = records_of(1000)
    assert Files(tmp_path, few).sample() == few
    assert len(Files(tmp_path, records_of(9000)).sample()) == 1000
    many = files_of(list_files(tmp_path, records_of(60_000)), tmp_path)
    assert 2 <= len(many.sample()) <= 32


def test_lists_are_kept_for_some_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lists, "_MAX_LISTS_IN_MEMORY", 2)
    files = files_of(list_files(tmp_path, records_of(12_000)), tmp_path)
    assert len(list(files)) == 12_000 and len(files._read) == 2


def test_a_damaged_list_is_named(tmp_path: Path) -> None:
    named = list_files(tmp_path, records_of(12_000))
    path = tmp_path / "files" / "000003.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"keys-", b"kexs-", 1))
    files = files_of(named, tmp_path)
    assert "000003.json does not have the checksum" in str(files.fault_of_lists())
    with pytest.raises(DamagedDataError, match=r"000003\.json does not have the checksum"):
        list(files)
    for bad in ({"files": [{}]}, {}, {"files": [], LISTS_KEY: [{"first": "a"}]}):
        with pytest.raises(DamagedDataError, match="manifest"):
            files_of(bad, tmp_path)


@pytest.mark.parametrize(
    "entry", [{"name": 3}, {"name": "../a"}, {"bytes": "3"}, {"sha256": None}, {"size": 3}]
)
def test_a_record_that_no_stage_writes_is_damage(entry: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(DamagedDataError, match="its list of files cannot be read"):
        files_of({"files": [{"name": "a", "bytes": 1, "sha256": "0", **entry}]}, tmp_path)
