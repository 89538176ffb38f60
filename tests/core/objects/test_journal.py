"""What was sent is noted, and believed where the store still has it."""

from __future__ import annotations

from pathlib import Path

from mlpmem_ds.core.files import FileRecord
from mlpmem_ds.core.objects.journal import Journal

A = FileRecord(name="a", bytes=3, sha256="0" * 64)
B = FileRecord(name="b", bytes=1, sha256="1" * 64)


def test_a_later_push_reads_what_the_store_has(tmp_path: Path) -> None:
    first = Journal(tmp_path, "memory://x")
    first.note(A)
    for sizes, known in (({"a": 3}, True), ({"a": 4}, False), ({}, False)):
        later = Journal(tmp_path, "memory://x")
        later.read(sizes)
        assert later.has(A) is known
    other = Journal(tmp_path, "memory://y")
    other.read({"a": 3})
    assert other.records == ()
    first.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_cut_short_or_changed_is_passed_over(tmp_path: Path) -> None:
    first = Journal(tmp_path, "memory://x")
    first.note(A)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + '{"name": ["b"], "bytes": 1, "sha256": "0"}\n{"name": "b", "by')
    later = Journal(tmp_path, "memory://x")
    later.read({"a": 3, "b": 1})
    assert later.records == (A,)
    later.note(B)
    again = Journal(tmp_path, "memory://x")
    again.read({"a": 3, "b": 1})
    assert again.records == (A, B)
