"""Whether every object of a mirror is what its list says: all are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mlpmem_ds.core.files import FileRecord
from mlpmem_ds.core.objects.fetch import THREADS
from mlpmem_ds.core.objects.listing import require_listing
from mlpmem_ds.core.objects.parts import PART_BYTES, in_order
from mlpmem_ds.core.objects.store import Store
from mlpmem_ds.core.objects.urls import join_url


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was read; `faults` name the objects that are not what the list says."""

    num_files: int
    num_bytes: int
    faults: tuple[str, ...]


def verify(store: Store, *, flag: str, threads: int = THREADS) -> Verified:
    """Read a mirror.

    Raises:
        UserError: there is no whole one.
    """
    listing = require_listing(store, flag=flag)
    sizes = store.sizes()

    def fault_of(record: FileRecord) -> str | None:
        where = join_url(store.url, record.name)
        if record.name not in sizes:
            return f"{where} is missing"
        if sizes[record.name] != record.bytes:
            return f"{where} has {sizes[record.name]:,} bytes of {record.bytes:,}"
        digest = hashlib.sha256()
        for part in _parts(store, record):
            digest.update(part)
        return None if digest.hexdigest() == record.sha256 else f"{where} does not have its checksum"

    with ThreadPoolExecutor(threads) as pool:
        faults = tuple(filter(None, in_order(pool, fault_of, listing.files, ahead=2 * threads)))
    return Verified(num_files=len(listing.files), num_bytes=listing.num_bytes, faults=faults)


def _parts(store: Store, record: FileRecord) -> Iterator[bytes]:
    for start in range(0, record.bytes, PART_BYTES):
        yield store.read_range(record.name, start, min(start + PART_BYTES, record.bytes)) or b""
