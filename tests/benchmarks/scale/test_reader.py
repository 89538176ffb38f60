"""`bench scale`, the reader's measures: they count what they say, at tiny sizes, and meet their goals."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.scale import reader
from mlpmem_ds.formats import targets as targets_module
from mlpmem_ds.formats.targets import open_targets


def test_the_order_and_the_rows_of_a_few_ranks_meet_their_goals(tmp_path: Path) -> None:
    for measure in reader.MEASURES:
        if measure.name in ("order_seconds_5e9", "order_seconds_2e11", "rows_read_per_row_used_w256"):
            assert measure.is_met_by(measure.function(tmp_path)), measure.name


def test_one_rank_reads_each_row_once(tmp_path: Path) -> None:
    assert reader.rows_read_per_row_used(tmp_path, size=1, batch_positions=1 << 20, num_windows=2) == 1


def test_memory_of_a_made_up_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its indexes are read and checked as real ones, more than are kept; none of the rows exists."""
    monkeypatch.setattr(reader, "_SHARD_POSITIONS", 1 << 14)
    monkeypatch.setattr(targets_module, "_INDEXES_KEPT", 64)
    num_bytes = reader.reader_bytes(tmp_path, num_positions=7_000 << 14)
    assert 1e6 < num_bytes < 1e8
    targets = open_targets(tmp_path / "targets")
    assert targets.num_positions == 7_000 << 14 and len(targets.files) == 14_000
    for shard in reader.visited(targets):
        assert targets.table_of(shard).firsts_S1[0] == shard.first
    assert len(targets._tables) == 64
