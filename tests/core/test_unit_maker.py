"""One unit: made once, compared afterwards, left to who has it, and made again where its file was taken."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core.claims import holder
from mlpmem_ds.core.log import EventLog, read_events
from mlpmem_ds.core.temporaries import temporary_path
from mlpmem_ds.core.unit_maker import UnitMaker
from mlpmem_ds.core.unit_records import UnitRecords
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World


@pytest.fixture
def records(tmp_path: Path) -> UnitRecords:
    return UnitRecords(tmp_path, "a" * 64)


@pytest.fixture
def maker(tmp_path: Path, records: UnitRecords) -> UnitMaker:
    return UnitMaker(tmp_path, records, EventLog(tmp_path / "log.jsonl", World()))


def compute(unit: str, writer: UnitWriter) -> Mapping[str, Any]:
    writer.array(f"{unit}.npy", np.ones(9))
    return {"sum": 9}


def test_a_unit_is_made_once_and_compared_afterwards(maker: UnitMaker, records: UnitRecords) -> None:
    assert maker.make("1", compute) and records.read("1")["summary"] == {"sum": 9}
    assert not maker.make("1", lambda *_: pytest.fail("made again"))
    assert not maker.make("1", None) and not maker.make("2", None)
    assert maker.verify("1") is None and maker.verify("2") == "unit 2 has not been made"


def test_a_unit_that_another_process_is_at_is_left_to_it_unless_it_was_dealt(
    maker: UnitMaker, records: UnitRecords
) -> None:
    records.claim_path("1").parent.mkdir()
    records.claim_path("1").write_text(holder(os.getppid()))
    assert not maker.make("1", compute) and not records.path("1").exists()
    assert maker.make("1", compute, is_dealt=True) and records.fault("1") is None


def test_a_unit_is_made_again_where_its_temporary_file_was_removed(
    maker: UnitMaker, records: UnitRecords, tmp_path: Path
) -> None:
    taken = [FileNotFoundError(2, "is missing", str(temporary_path(tmp_path / "1.npy")))]

    def compute_again(unit: str, writer: UnitWriter) -> Mapping[str, Any]:
        if taken:
            raise taken.pop()
        return compute(unit, writer)

    assert maker.make("1", compute_again) and records.fault("1") is None
    taken.append(FileNotFoundError(2, "is missing", str(tmp_path / "corpus.npy")))
    with pytest.raises(FileNotFoundError, match=r"corpus\.npy"):
        maker.make("2", compute_again)
    assert not records.path("2").exists() and not records.claim_path("2").exists()


def test_the_log_says_what_was_taken_over_and_what_later_units_read(maker: UnitMaker, tmp_path: Path) -> None:
    maker.mark_read_here(["codec"])
    maker.make("codec", compute)
    maker.make("1", compute, taken_over=True)
    first, second = read_events(tmp_path / "log.jsonl")
    assert first["unit"] == "codec" and first["read_here"] is True and "taken_over" not in first
    assert second["unit"] == "1" and second["taken_over"] is True and "read_here" not in second
    assert first["bytes"] == (tmp_path / "codec.npy").stat().st_size
