"""What a push has sent, a line a file, in a hidden file of the directory: a push that was interrupted goes on
behind it.

    .mirror-<hash of the URL>.jsonl     {"name", "bytes", "sha256"} of each object that was sent

A line is believed where the store has an object of that name and size. The file is removed when the mirror is
whole.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path

from mlpmem_ds.core.files import FileRecord, content_hash
from mlpmem_ds.core.log import append_json_line, read_json_lines


class Journal:
    """Of one directory and one URL; several threads may add lines."""

    def __init__(self, root: Path, url: str) -> None:
        self._path = root / f".mirror-{content_hash(url)[:12]}.jsonl"
        self._lock = threading.Lock()
        self._sent: dict[str, FileRecord] = {}

    def read(self, sizes: Mapping[str, int]) -> None:
        """Take what an earlier push has noted, and the store still has.

        Args:
            sizes: name → bytes of the store's objects.
        """
        for line in read_json_lines(self._path):
            with contextlib.suppress(TypeError, ValueError):  # a line of other fields
                record = FileRecord(**line)
                if sizes.get(record.name) == record.bytes:
                    self._sent[record.name] = record

    def note(self, record: FileRecord) -> None:
        with self._lock:
            self._sent[record.name] = record
            # Of a directory that cannot be written an interrupted push begins anew.
            with contextlib.suppress(OSError):
                append_json_line(self._path, record.to_json())

    def has(self, record: FileRecord) -> bool:
        return self._sent.get(record.name) == record

    @property
    def records(self) -> tuple[FileRecord, ...]:
        return tuple(self._sent.values())

    def remove(self) -> None:
        """When the mirror is whole, or no object of it is believed any more."""
        self._sent.clear()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
