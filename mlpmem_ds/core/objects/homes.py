"""A directory of the cache: where it is from, how much it counts for, and which processes use it.

`cache.py` says what lies in one.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlpmem_ds.core.claims import claim, is_held
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import FileRecord, read_sealed_json
from mlpmem_ds.core.host import this_process
from mlpmem_ds.core.objects.fetch import HALF, partial_path
from mlpmem_ds.core.objects.locks import PathLocks
from mlpmem_ds.core.objects.on_demand import MARK, SOURCE, is_home, is_on_demand
from mlpmem_ds.core.temporaries import is_given_up, time_of_file_system
from mlpmem_ds.core.typed_json import from_json

DROPPED = ".mlpmem-dropped-"
"""the start of the name of one that is being removed"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a directory of the cache is from. `reserved` bytes that its first fetch takes."""

    url: str
    name: str
    patterns: tuple[str, ...]
    num_files: int
    num_bytes: int
    reserved: int


@dataclass(frozen=True, kw_only=True)
class Held:
    """A directory of the cache as it is now. Of `num_bytes`, which it counts for, `num_awaited` are reserved
    and not there yet. `used` in seconds of the clock."""

    home: Path
    source: Source
    num_bytes: int
    num_awaited: int
    used: float
    is_in_use: bool


_locks = PathLocks()
_used_here: defaultdict[Path, int] = defaultdict(int)  # directory → how often this process has it open
_claims: defaultdict[Path, contextlib.ExitStack] = defaultdict(contextlib.ExitStack)


def contents(root: Path) -> list[Held]:
    """What a cache holds, the latest use first."""
    found = []
    for home in sorted(root.iterdir()) if root.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # another process drops it in this moment
            if is_home(home) and (source := source_of(home)) is not None:
                found.append(_held(home, source))
    return sorted(found, key=lambda each: -each.used)


def counted_already(held: Sequence[Held], root: Path, records: Sequence[FileRecord]) -> int:
    """Of the bytes of files that are to be fetched into `root` those that its directory of the cache counts
    for as it is: as half a file, which counts in full, as a damaged one, or as reserved and not there yet."""
    ours = next((each for each in held if each.home == root.parent), None)
    if ours is None:
        return 0
    is_left = sum(bytes_of(path) for path in paths_of(root, records) if path.exists())
    at_once = (record for record in records if not is_on_demand(record.name, ours.source.patterns))
    return is_left + min(ours.num_awaited, sum(record.bytes for record in at_once))


def paths_of(root: Path, records: Sequence[FileRecord]) -> set[Path]:
    """Of files that are to be fetched: what may be there of them."""
    return {
        path for record in records for path in (root / record.name, partial_path(root / record.name, record))
    }


@contextlib.contextmanager
def use(home: Path) -> Iterator[None]:
    """Let a directory of the cache be in use, by this process."""
    home.mkdir(parents=True, exist_ok=True)
    (home / MARK).touch()
    with contextlib.suppress(FileNotFoundError):
        os.utime(home / SOURCE)
    with _locks.of(home):
        if _used_here[home] == 0:
            _claims[home].enter_context(claim(home / f".use-{this_process().name}.claim"))
        _used_here[home] += 1
    try:
        yield
    finally:
        with _locks.of(home):
            _used_here[home] -= 1
            if _used_here[home] == 0:
                _claims.pop(home).close()


def is_remains(home: Path) -> bool:
    """Whether it is the rest of a directory of the cache, by a mark or a name that only the cache gives."""
    if home.name.startswith(DROPPED):
        return True
    if not is_home(home) or _is_in_use(home):
        return False
    try:
        read_sealed_json(home / SOURCE)
    except DamagedDataError:  # or none
        return True
    return False  # perhaps of a newer version


def files_below(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        yield from (Path(folder, name) for name in names)


def bytes_of(path: Path) -> int:
    """Of a file that is being fetched those that it will have."""
    if path.suffix == HALF and (size := path.name.split(".")[-2]).isdigit():
        return int(size)
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _held(home: Path, source: Source) -> Held:
    num_bytes = sum(map(bytes_of, files_below(home)))
    num_awaited = max(0, source.reserved - num_bytes)
    return Held(
        home=home,
        source=source,
        num_bytes=num_bytes + num_awaited,
        num_awaited=num_awaited,
        used=(home / SOURCE).stat().st_mtime,
        is_in_use=_is_in_use(home),
    )


def _is_in_use(home: Path) -> bool:
    """Whether a process uses it. Of containers that are gone claims are left, which are touched no more."""
    if _used_here[home] > 0:
        return True
    held = [path for path in home.glob(".use-*.claim") if is_held(path)]
    if not held:
        return False
    now = time_of_file_system(home)
    return not all(is_given_up(path, now=now) for path in held)


def source_of(home: Path) -> Source | None:
    """What a directory of the cache says of itself; None where it is not there yet, or cannot be read."""
    path = home / SOURCE
    try:
        return from_json(Source, read_sealed_json(path), where=str(path), version=1)
    except DamagedDataError:  # another program's, or one that is being filled
        return None
