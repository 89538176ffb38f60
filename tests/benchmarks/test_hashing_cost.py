"""Hashing is counted, also of files that this process has compared before."""

from __future__ import annotations

from pathlib import Path

from mlpmem_ds.benchmarks.hashing_cost import counted_hashing
from mlpmem_ds.core.files import first_fault, record_file


def test_bytes_and_seconds_of_all_threads_are_counted(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.bin").write_bytes(bytes(100_000 + number))
    with counted_hashing() as cost:
        records = [record_file(tmp_path, f"{number}.bin") for number in range(5)]
    assert cost.bytes == 500_010 and cost.seconds > 0
    assert first_fault(tmp_path, records) is None
    with counted_hashing() as cost:
        assert first_fault(tmp_path, records) is None
        assert first_fault(tmp_path, records) is None  # a second reader of the same process
    assert cost.bytes == 500_010
    assert first_fault(tmp_path, records) is None
    assert cost.bytes == 500_010
