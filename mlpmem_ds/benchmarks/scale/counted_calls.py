"""Counts what a program asks of a file system: opens by an audit hook, stats by wrapped functions."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

_counters: list[tuple[str, Counter[str]]] = []
_is_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in ("open", "os.scandir", "os.listdir") or not _counters:
        return
    path = arguments[0]
    for root, counter in _counters:
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(root):
            counter["listings" if event != "open" else "opens"] += 1
            counter[os.path.basename(os.fspath(path)).partition("-")[0]] += 1


@contextlib.contextmanager
def counted_calls(root: os.PathLike[str]) -> Iterator[Counter[str]]:
    """`opens`, `listings` and `stats` (of paths and of open files) below `root` while the block runs.

    Opens are also counted by what stands before the first hyphen of the file's name.
    """
    global _is_hooked
    if not _is_hooked:  # a hook stays for the life of the process
        sys.addaudithook(_hook)
        _is_hooked = True
    counter: Counter[str] = Counter()
    stat, fstat = os.stat, os.fstat

    def counting_stat(path: Any, *arguments: Any, **named: Any) -> os.stat_result:
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(os.fspath(root)):
            counter["stats"] += 1
        return stat(path, *arguments, **named)

    def counting_fstat(fd: int) -> os.stat_result:
        counter["stats"] += 1
        return fstat(fd)

    _counters.append((os.fspath(root), counter))
    os.stat, os.fstat = counting_stat, counting_fstat
    try:
        yield counter
    finally:
        os.stat, os.fstat = stat, fstat
        _counters.pop()
