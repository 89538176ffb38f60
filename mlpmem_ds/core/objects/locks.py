"""A lock a path, for the threads of this process; claims and temporary names tell processes apart."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path


class PathLocks:
    """The lock of each path; a path that was asked for keeps its own."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)

    def of(self, path: Path) -> threading.Lock:
        with self._guard:
            return self._locks[path]
