"""The files that a manifest names: in the manifest itself up to 10,000, above that in sealed lists of 1,000.

A manifest of a million entries is 150 MB of JSON, and minutes and gigabytes of every rank that reads it. So a
large one names *lists*, which are read when a file of theirs is asked for. Files ascend by name within a list
and from list to list: the list of a name is found without reading any.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.blocks import split_blocks
from mlpmem_ds.core.errors import DamagedDataError, first_line
from mlpmem_ds.core.files import (
    FileRecord,
    fault_of_file,
    publish_json,
    read_sealed_json,
    record_file,
)
from mlpmem_ds.core.folders import folder_of
from mlpmem_ds.core.objects.on_demand import remedy_of
from mlpmem_ds.core.typed_json import from_json, to_json

MAX_FILES_IN_MANIFEST = 10_000
LISTS_KEY = "file_lists"
"""of a manifest with lists; a manifest without does not have it"""
_FILES_OF_LIST = 1000
_MAX_LISTS_IN_MEMORY = 64
_MAX_CHECKED = 1000  # files whose sizes are compared when a directory is opened
_MAX_LISTS_CHECKED = 16


@dataclass(frozen=True, kw_only=True)
class FileList:
    """A file with the records of up to 1,000 others; `first` is the least name among them."""

    file: FileRecord
    first: str
    num_files: int
    num_bytes: int
    """of all its files"""


class Files:
    """The records of a complete stage's files."""

    def __init__(self, root: Path, records: Sequence[FileRecord], lists: Sequence[FileList] = ()) -> None:
        self._root = root
        self._records = {record.name: record for record in records}
        self._lists = tuple(lists)
        self._firsts = [found.first for found in lists]
        self._read: OrderedDict[int, dict[str, FileRecord]] = OrderedDict()
        self._lock = threading.Lock()  # threads of a reader ask at the same time

    def __len__(self) -> int:
        return len(self._records) + sum(found.num_files for found in self._lists)

    def __iter__(self) -> Iterator[FileRecord]:
        """All of them; reads the lists one by one."""
        yield from self._records.values()
        for number in range(len(self._lists)):
            yield from self._records_of(number).values()

    @property
    def num_bytes(self) -> int:
        """Of all files together, without reading a list."""
        own = sum(record.bytes for record in self._records.values())
        return own + sum(found.num_bytes for found in self._lists)

    def find(self, name: str) -> FileRecord | None:
        """The record of a file; reads at most one list.

        Raises:
            DamagedDataError: that list is missing or damaged.
        """
        if not self._lists:
            return self._records.get(name)
        number = bisect_right(self._firsts, name) - 1
        return self._records_of(number).get(name) if number >= 0 else None

    def starting_with(self, prefix: str) -> Iterator[FileRecord]:
        """The files whose names start so; reads no list that cannot hold one."""
        for number in range(max(0, bisect_right(self._firsts, prefix) - 1), len(self._lists)):
            first = self._firsts[number]
            if first > prefix and not first.startswith(prefix):
                break
            found = self._records_of(number).values()
            yield from (record for record in found if record.name.startswith(prefix))
        yield from (record for record in self._records.values() if record.name.startswith(prefix))

    def sample(self) -> list[FileRecord]:
        """Those whose sizes are compared when the directory is opened: all of 1,000, some of more.

        The others are compared when they are first used.
        """
        if not self._lists:
            records = list(self._records.values())
            return records[:: -(-len(records) // _MAX_CHECKED)] if records else []
        step = -(-len(self._lists) // _MAX_LISTS_CHECKED)
        chosen = [list(self._records_of(number).values()) for number in range(0, len(self._lists), step)]
        return [record for records in chosen for record in (records[0], records[-1])]

    def fault_of_lists(self) -> str | None:
        """Say which list is missing or does not have its checksum, or None."""
        return next(filter(None, (fault_of_file(self._root, found.file) for found in self._lists)), None)

    def _records_of(self, number: int) -> dict[str, FileRecord]:
        with self._lock:
            if number in self._read:
                self._read.move_to_end(number)
                return self._read[number]
        file = self._lists[number].file
        if fault := fault_of_file(self._root, file):
            local = f"run the stage that made {self._root} again, it writes it anew"
            raise DamagedDataError(f"{fault}: {remedy_of(self._root, local=local)}")
        records = records_in(read_sealed_json(self._root / file.name), self._root / file.name)
        by_name = {record.name: record for record in records}
        with self._lock:
            self._read[number] = by_name
            if len(self._read) > _MAX_LISTS_IN_MEMORY:
                self._read.popitem(last=False)
        return by_name


def records_in(
    values: Mapping[str, Any], path: Path | str, *, remedy: str = "run its stage again, it writes it anew"
) -> list[FileRecord]:
    """The records under `files` of a manifest or a list.

    Raises:
        DamagedDataError: they cannot be read, or name a file elsewhere.
    """
    try:
        return [FileRecord(**entry) for entry in values["files"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedDataError(
            f"{path} is damaged: its list of files cannot be read ({first_line(error)}); {remedy}"
        ) from error


def files_of(values: Mapping[str, Any], root: Path, *, version: int = 1) -> Files:
    """The files that a manifest of these values names, without reading its lists.

    Raises:
        DamagedDataError: the manifest's list of files, or of lists, cannot be read.
    """
    path = root / "manifest.json"
    lists = [
        from_json(FileList, entry, where=str(path), version=version) for entry in values.get(LISTS_KEY, ())
    ]
    return Files(root, records_in(values, path), lists)


def list_files(root: Path, records: Sequence[FileRecord]) -> dict[str, Any]:
    """The keys of a manifest that name these files; above 10,000 of them their lists are published first."""
    if len(records) <= MAX_FILES_IN_MANIFEST:
        return {"files": to_json(list(records))}
    ordered = sorted(records, key=lambda record: record.name)
    blocks = split_blocks(len(ordered), _FILES_OF_LIST)
    lists = []
    for number, block in enumerate(blocks):
        listed = ordered[slice(*block)]
        name = f"files/{folder_of(number, len(blocks))}{number:06d}.json"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        publish_json(root / name, {"files": to_json(listed)}, seal=True)
        lists.append(
            FileList(
                file=record_file(root, name),
                first=listed[0].name,
                num_files=len(listed),
                num_bytes=sum(record.bytes for record in listed),
            )
        )
    return {"files": [], LISTS_KEY: to_json(lists)}
