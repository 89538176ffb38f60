"""What checksums cost a command: seconds and bytes of hashing files, all threads together.

Counted are files that are hashed whole: those that a reader compares, and those that a library has written.
What is hashed while it is written, block by block, is not.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from mlpmem_ds.core import files


@dataclass
class HashingCost:
    """So far; `seconds` of several threads at once count each."""

    bytes: int = 0
    seconds: float = 0.0


@contextlib.contextmanager
def counted_hashing() -> Iterator[HashingCost]:
    """Count while the block runs; what this process has compared before is compared again."""
    cost, lock, sha256_of_file = HashingCost(), threading.Lock(), files.sha256_of_file

    def count(path: Path) -> str:
        start = time.perf_counter()
        digest = sha256_of_file(path)
        seconds = time.perf_counter() - start
        with lock:
            cost.bytes += path.stat().st_size
            cost.seconds += seconds
        return digest

    with (
        mock.patch.object(files, "sha256_of_file", count),
        mock.patch.object(files, "_compared", set()),
    ):
        yield cost
