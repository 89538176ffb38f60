"""Which records a rank believes without reading the unit's files, and where records lie."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mlpmem_ds.core.files import publish_json, record_file
from mlpmem_ds.core.unit_records import UnitRecords, missing_of, recorded_files


@pytest.fixture
def records(tmp_path: Path) -> UnitRecords:
    """One unit, `a`, with one file, made just now."""
    found = UnitRecords(tmp_path, "i" * 64)
    (tmp_path / "done").mkdir()
    (tmp_path / "part").write_bytes(b"12345")
    found.publish("a", [record_file(tmp_path, "part")], {})
    return found


def set_age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_unit_made_in_this_run_is_trusted_by_its_sizes(records: UnitRecords, tmp_path: Path) -> None:
    assert records.is_trusted("a") and not records.is_trusted("b")
    (tmp_path / "part").write_bytes(b"1234")
    assert not records.is_trusted("a")
    (tmp_path / "part").unlink()
    assert not records.is_trusted("a")


def test_a_unit_of_an_earlier_run_is_not_trusted_until_a_rank_compared_it(
    records: UnitRecords, tmp_path: Path
) -> None:
    for path in (tmp_path / "part", records.path("a")):
        set_age(path, 3600)
    assert not records.is_trusted("a")
    records.mark_verified("a")
    assert records.is_trusted("a") and records.fault("a") is None


def test_a_file_written_after_its_record_is_not_trusted(records: UnitRecords, tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"12346")
    set_age(tmp_path / "part", -60)
    assert not records.is_trusted("a")
    assert str(records.fault("a")).endswith("part does not have the checksum of its record")


def test_a_damaged_record_is_not_trusted(records: UnitRecords) -> None:
    records.path("a").write_text("{")
    assert not records.is_trusted("a") and records.fault("a") == "the record of unit a is damaged"


def test_a_record_that_names_a_file_elsewhere_is_damaged(records: UnitRecords) -> None:
    entry = {"name": "../part", "bytes": 5, "sha256": "0"}
    publish_json(records.path("a"), {"unit": "a", "files": [entry]}, seal=True)
    assert not records.is_trusted("a") and records.fault("a") == "the record of unit a is damaged"


def test_the_records_of_many_units_lie_in_folders_of_a_thousand(tmp_path: Path) -> None:
    few, many = [f"{number}" for number in range(1000)], [f"{number:05d}" for number in range(2500)]
    records = UnitRecords(tmp_path, "i" * 64)
    records.place(few)
    records.place(many)
    assert records.path("7") == tmp_path / "done" / "7.json"
    assert records.path("02007") == tmp_path / "done" / "0002" / "02007.json"
    assert records.claim_path("02007") == tmp_path / "done" / "0002" / ".02007.claim"
    for unit in ("7", "02007"):
        records.path(unit).parent.mkdir(parents=True)
        records.publish(unit, [], {})
    records.claim_path("02008").write_text("")
    listing = records.listing()
    assert listing.recorded == {"7", "02007"} and listing.claimed == {"02008"}
    assert len(missing_of(many, listing)) == 2499


def test_the_files_of_recorded_units_are_told_before_the_stage_is_opened(
    records: UnitRecords, tmp_path: Path
) -> None:
    assert list(recorded_files(tmp_path, ["a", "b"])) == [("a", {"part"})]
    assert list(recorded_files(tmp_path / "missing", ["a"])) == []
    records.path("a").write_text("{")
    assert list(recorded_files(tmp_path, ["a"])) == []


def test_the_files_of_recorded_units_are_found_in_folders_of_a_thousand(tmp_path: Path) -> None:
    records, many = UnitRecords(tmp_path, "i" * 64), [f"{number:05d}" for number in range(2500)]
    records.place(many)
    records.path("02400").parent.mkdir(parents=True)
    (tmp_path / "part").write_bytes(b"1")
    records.publish("02400", [record_file(tmp_path, "part")], {})
    assert list(recorded_files(tmp_path, many)) == [("02400", {"part"})]
