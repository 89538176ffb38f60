"""Files from a URL: in parts, compared with their checksums as they arrive, continued where they were.

A file is written as `.<name>.<checksum>.<bytes>.partial` until it is whole, so that what was fetched before
an interruption is not fetched again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from mlpmem_ds.core.claims import claim_alone
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import FileRecord, fault_of_content, fault_of_file, flush, naming
from mlpmem_ds.core.objects.contents import CHECKPOINTS, IDENTITY, LocalDirectory, kind_of
from mlpmem_ds.core.objects.listing import LAST_FILES, Listing, require_listing
from mlpmem_ds.core.objects.parts import PART_BYTES, in_order
from mlpmem_ds.core.objects.store import Store
from mlpmem_ds.core.objects.urls import join_url

THREADS = 8
HALF = ".partial"
"""how the name of a file that is being fetched ends"""
_PARTS_AHEAD = 3
_HASH_BYTES = 1 << 20
_REMEDY = "push the directory again with tools/mirror.py --replace, or check what else writes there"


def fetch_file(store: Store, record: FileRecord, root: Path) -> None:
    """An object as the file of its name below `root`, which appears when its checksum is right.

    What an earlier fetch has left is gone on with; where it was damaged, it is dropped.

    Raises:
        DamagedDataError: the object is missing, of another size, or has another checksum; the file that was
            begun is removed.
    """
    path = root / record.name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path, record)
    partial.touch()
    with naming(path), open(partial, "r+b") as stream:
        digest = hashlib.sha256()
        start = _hash_whole_parts(stream, digest)
        fault = _receive(store, record, stream, digest, start=start)
        if fault and start:  # of what was left, perhaps, and not of the object
            stream.seek(0)
            digest = hashlib.sha256()
            fault = _receive(store, record, stream, digest, start=0)
    if fault:
        partial.unlink(missing_ok=True)
        raise DamagedDataError(f"{join_url(store.url, record.name)} {fault}")
    try:
        flush(partial)
        os.replace(partial, path)
    except FileNotFoundError:  # another process fetched the same file, and has given it its name
        if fault_of_file(root, record) is not None:
            raise


def _receive(store: Store, record: FileRecord, stream: BinaryIO, digest: Any, *, start: int) -> str | None:
    """Write an object's bytes from `start` on, and what ends there; say what is wrong with all of them."""
    for part in _parts_of(store, record, start):
        if part is None:
            return f"is missing, and the mirror's list names it: {_REMEDY}"
        digest.update(part)
        stream.write(part)
    num_bytes = stream.tell()
    stream.truncate()
    if num_bytes != record.bytes:
        return f"is cut short or changed: {num_bytes:,} bytes of {record.bytes:,}; {_REMEDY}"
    if digest.hexdigest() != record.sha256:
        return f"does not have the checksum of the mirror's list: {_REMEDY}"
    return None


def partial_path(path: Path, record: FileRecord) -> Path:
    """Of a file that is being fetched: the name says how large it will be."""
    return path.with_name(f".{path.name}.{record.sha256[:12]}.{record.bytes}{HALF}")


def bytes_to_write(root: Path, records: Iterable[FileRecord]) -> int:
    """How many more bytes of a disk a fetch of files takes: what an earlier one has left of them is there."""
    return sum(
        record.bytes - min(record.bytes, _size_of(partial_path(root / record.name, record)))
        for record in records
    )


def _size_of(path: Path) -> int:
    """Bytes that are free once a file is removed: none where there is no file, or one of several names."""
    try:
        state = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return state.st_size if stat.S_ISREG(state.st_mode) and state.st_nlink == 1 else 0


def _hash_whole_parts(stream: BinaryIO, digest: Any) -> int:
    """Hash the whole parts that an earlier fetch has left, and stand behind them; their bytes."""
    start = os.fstat(stream.fileno()).st_size // PART_BYTES * PART_BYTES
    while stream.tell() < start:
        digest.update(stream.read(min(_HASH_BYTES, start - stream.tell())))
    return start


def _parts_of(store: Store, record: FileRecord, start: int) -> Iterator[bytes | None]:
    """The bytes of an object from `start` on; None where there is no object."""
    starts = range(start, record.bytes, PART_BYTES)

    def read(first: int) -> bytes | None:
        return store.read_range(record.name, first, min(first + PART_BYTES, record.bytes))

    if len(starts) == 1 and start == 0:
        yield store.read(record.name)  # whole, so that one that has grown is seen
        return
    if not starts:
        return
    with ThreadPoolExecutor(_PARTS_AHEAD + 1) as pool:
        yield from in_order(pool, read, starts, ahead=_PARTS_AHEAD)


def fetch_files(store: Store, records: Iterable[FileRecord], root: Path, *, threads: int = THREADS) -> None:
    """Several files at once; those that are there are replaced."""

    def fetch(record: FileRecord) -> None:
        fetch_file(store, record, root)

    with ThreadPoolExecutor(threads) as pool:
        for _ in in_order(pool, fetch, records, ahead=2 * threads):
            pass


def not_whole(root: Path, records: Iterable[FileRecord], *, threads: int = THREADS) -> list[FileRecord]:
    """Those whose files are missing, or do not have their checksums."""
    with ThreadPoolExecutor(threads) as pool:
        faults = in_order(
            pool, lambda record: (record, fault_of_content(root, record)), records, ahead=2 * threads
        )
        return [record for record, fault in faults if fault is not None]


def pull(store: Store, root: Path, *, flag: str, threads: int = THREADS, replace: bool = False) -> Listing:
    """A whole mirror as a local directory, which is complete at the end and not before.

    Files that are there are compared with their checksums, and fetched where they differ: of what says
    itself that it is this directory, by its identity or its list of files, and of any other with `replace`.

    Raises:
        UserError: no whole mirror, too little space, the directory is another one, or another process is
            fetching into it.
        DamagedDataError: an object is not what the list says; its name is in the message.
    """
    listing = require_listing(store, flag=flag)
    _refuse_other(root, store, listing)
    is_new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    refusal = f"another process is fetching into {root}: wait until it has ended, or give another directory"
    try:
        with claim_alone(root / ".fetch.claim", refusal=refusal):
            _fetch_what_differs(store, listing, root, threads, replace=replace)
    except UserError:
        if is_new:
            with contextlib.suppress(OSError):  # what was fetched stays
                root.rmdir()
        raise
    return listing


def _fetch_what_differs(store: Store, listing: Listing, root: Path, threads: int, *, replace: bool) -> None:
    missing = not_whole(root, listing.files, threads=threads)
    others = [record for record in missing if (root / record.name).exists()]
    if others and not (replace or _is_of(root, listing) or _is_list_alone(others, missing, listing)):
        raise UserError(
            f"{root} holds another {others[0].name} than {store.url}, of another directory or damaged: give"
            " another directory, or --replace what is there"
        )
    needed = bytes_to_write(root, missing) - sum(_size_of(root / record.name) for record in missing)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(f"{store.url} needs {needed:,} bytes, and {root} has {free:,} free: free some space")
    last = [record for record in missing if record.name in LAST_FILES]
    for record in (*last, *missing):  # the last first: not complete meanwhile
        (root / record.name).unlink(missing_ok=True)
    fetch_files(store, (record for record in missing if record.name not in LAST_FILES), root, threads=threads)
    for folder in {(root / record.name).parent for record in missing}:
        flush(folder)
    for record in last:
        fetch_file(store, record, root)
    flush(root)


def _is_of(root: Path, listing: Listing) -> bool:
    """Whether a directory says itself that it is the one that was mirrored; one of another program does
    not."""
    kind = kind_of(root)
    return kind is not None and LocalDirectory(root=root, name="", kind=kind).of() == listing.of


def _is_list_alone(others: list[FileRecord], missing: list[FileRecord], listing: Listing) -> bool:
    """Whether of all files that are there the directory's own list alone is another: it is damaged."""
    return [record.sha256 for record in others] == [listing.of] and len(missing) < len(listing.files)


def _refuse_other(root: Path, store: Store, listing: Listing) -> None:
    """Nothing is written into a directory of something else."""
    if not root.exists():
        return
    if not root.is_dir():
        raise UserError(f"{root} is a file: give a directory for what {store.url} holds")
    identity = listing.find(IDENTITY)
    names = {record.name.partition("/")[0] for record in listing.files}
    names |= {CHECKPOINTS} if identity is not None else set()  # of a stage: fetched one by one
    foreign = [
        path.name for path in root.iterdir() if not path.name.startswith(".") and path.name not in names
    ]
    differs = identity is not None and (root / identity.name).is_file() and fault_of_file(root, identity)
    if foreign or differs:
        reason = f"holds {sorted(foreign)[0]}" if foreign else "is of another run"
        raise UserError(f"{root} {reason}, which {store.url} does not have: give another directory")
