"""What a mirror holds, and whose it is.

    .mirror/begun.json      {format, version, of}: which directory is mirrored here; the first object
    .mirror/<number>.json   {files}: records of up to 10,000 files
    .mirror/files.json      {format, version, of, num_files, num_bytes, lists}: the last object

All are sealed (core/files.py). `of` is the SHA-256 that tells the directory from others: of a stage's
identity, of a checkpoint's or an export's list of files, of any other directory's names and checksums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlpmem_ds.core.blocks import split_blocks
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.file_lists import records_in
from mlpmem_ds.core.files import FileRecord, parse_sealed_json, sealed_json
from mlpmem_ds.core.objects.store import Store
from mlpmem_ds.core.objects.urls import join_url
from mlpmem_ds.core.typed_json import from_json, to_json

FOLDER = ".mirror"
BEGUN, FILES = f"{FOLDER}/begun.json", f"{FOLDER}/files.json"
LAST_FILES = ("manifest.json", "mlpmem_export.json")
"""what makes a directory complete: sent and fetched after all others"""
_FORMAT, _VERSION = "mlpmem-mirror", 1
_FILES_OF_LIST = 10_000
_REMEDY = "push the directory again with tools/mirror.py --replace"


@dataclass(frozen=True, kw_only=True)
class _Begun:
    format: str
    version: int
    of: str


@dataclass(frozen=True, kw_only=True)
class _Summary:
    format: str
    version: int
    of: str
    num_files: int
    num_bytes: int
    lists: tuple[FileRecord, ...]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A whole mirror: `of` which directory, `sha256` of `.mirror/files.json`, which its content decides."""

    of: str
    sha256: str
    files: tuple[FileRecord, ...]

    @property
    def num_bytes(self) -> int:
        return sum(record.bytes for record in self.files)

    def find(self, name: str) -> FileRecord | None:
        return next((record for record in self.files if record.name == name), None)


def begin(store: Store, of: str, *, name: str) -> None:
    """Note whose mirror this is, before anything else is written.

    Raises:
        UserError: it is another directory's.
    """
    content = sealed_json({"format": _FORMAT, "version": _VERSION, "of": of})
    found = store.write_if_absent(BEGUN, content)
    begun = from_json(
        _Begun, _checked(store, BEGUN, found), where=join_url(store.url, BEGUN), version=_VERSION
    )
    require_same(store, begun.of, of, name=name)


def require_same(store: Store, found: str, of: str, *, name: str) -> None:
    """
    Raises:
        UserError: a mirror is of another directory.
    """
    if found != of:
        raise UserError(
            f"{store.url} is the mirror of another directory than {name} (identity {found[:12]} and"
            f" {of[:12]}): choose another URL, or --replace what is there"
        )


def publish_listing(store: Store, of: str, files: Sequence[FileRecord]) -> None:
    """Write what a mirror holds: with this it is whole."""
    ordered = sorted(files, key=lambda record: record.name)
    lists = []
    for number, block in enumerate(split_blocks(len(ordered), _FILES_OF_LIST)):
        content = sealed_json({"files": to_json(ordered[slice(*block)])})
        name = f"{FOLDER}/{number:06d}.json"
        store.write(name, content)
        lists.append(FileRecord(name=name, bytes=len(content), sha256=_sha256(content)))
    summary = _Summary(
        format=_FORMAT,
        version=_VERSION,
        of=of,
        num_files=len(ordered),
        num_bytes=sum(record.bytes for record in ordered),
        lists=tuple(lists),
    )
    store.write(FILES, sealed_json(to_json(summary)))


def withdraw(store: Store) -> None:
    """Take away what says that the mirror is whole, and whose it is, before its files change."""
    for name in (FILES, *LAST_FILES, BEGUN):
        store.remove(name)


def read_listing(store: Store) -> Listing | None:
    """What a whole mirror holds; None where there is none, or one that is not whole.

    Raises:
        DamagedDataError: it cannot be believed.
    """
    content = store.read(FILES)
    if content is None:
        return None
    where = join_url(store.url, FILES)
    summary = from_json(_Summary, _checked(store, FILES, content), where=where, version=_VERSION)
    if (summary.format, summary.version) != (_FORMAT, _VERSION):
        raise DamagedDataError(
            f"{where} is no {_FORMAT} of version {_VERSION}: use the release that wrote it"
        )
    files: list[FileRecord] = []
    for record in summary.lists:
        listed = store.read(record.name)
        if listed is None or _sha256(listed) != record.sha256:
            raise DamagedDataError(f"{join_url(store.url, record.name)} is missing or changed: {_REMEDY}")
        values = _checked(store, record.name, listed)
        files += records_in(values, join_url(store.url, record.name), remedy=_REMEDY)
    return Listing(of=summary.of, sha256=_sha256(content), files=tuple(files))


def require_listing(store: Store, *, flag: str) -> Listing:
    """As `read_listing`.

    Raises:
        UserError: there is no whole mirror.
    """
    listing = read_listing(store)
    if listing is not None:
        return listing
    if store.read(BEGUN) is not None:
        raise UserError(
            f"{flag} {store.url} is not whole: its push has not ended; the same command of tools/mirror.py"
            " goes on with it"
        )
    raise UserError(
        f"{flag} {store.url} holds no mirror: push a directory there with tools/mirror.py DIRECTORY URL, or"
        " check the URL"
    )


def _checked(store: Store, name: str, content: bytes) -> Mapping[str, Any]:
    return parse_sealed_json(content, join_url(store.url, name), remedy=_REMEDY)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
