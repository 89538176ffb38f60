"""The records of a stage's units: which there are, what they say, and when their files were last compared.

A record is written by the rank that made the unit, after its files. Its modification time says when the
files were last known to be whole: when they were made, or when a rank compared them with their checksums
(`mark_verified`). So a rank that waits for a unit need not read its files: it believes a young record whose
files have their sizes and were not written to since.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import FileRecord, fault_of_file, publish_json, read_sealed_json
from mlpmem_ds.core.folders import folder_of
from mlpmem_ds.core.run_description import IDENTITY_FIELD
from mlpmem_ds.core.temporaries import time_of_file_system

_SECONDS_OF_TRUST = 600.0
"""before this process opened the directory: ranks of one run do not start at the same moment"""
_NUM_READERS = 16
_CLOCK_SECONDS = 2.0  # by which two clients' times of one file system may differ, and its granularity


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The units that have a record, and those that have a claim, at one moment."""

    recorded: frozenset[str]
    claimed: frozenset[str]


class UnitRecords:
    """`done/` of a stage directory."""

    def __init__(self, root: Path, identity_sha256: str) -> None:
        self._root = root
        self._identity_sha256 = identity_sha256
        self._folder_of: dict[str, str] = {}
        self._folders = {""}
        self._trusted_from = time_of_file_system(root) - _SECONDS_OF_TRUST

    def place(self, units: Sequence[str]) -> None:
        """Tell all units of a phase, whose number decides where their records lie."""
        for number, unit in enumerate(units):
            folder = self._folder_of[unit] = folder_of(number, len(units))
            self._folders.add(folder)

    def path(self, unit: str) -> Path:
        return _record_path(self._root, self._folder_of.get(unit, ""), unit)

    def claim_path(self, unit: str) -> Path:
        return self.path(unit).with_name(f".{unit}.claim")

    def former_path(self, unit: str) -> Path:
        """The record of a unit that was found damaged, until it is made again."""
        return self.path(unit).with_name(f".{unit}.former")

    def folders(self) -> list[Path]:
        """Where records of the units placed so far may lie; some may not exist yet."""
        return [self._root / "done" / folder for folder in sorted(self._folders)]

    def listing(self) -> Listing:
        """What is there now: one listing of a folder, for any number of units.

        Opening a directory makes an NFS client ask the server whether it changed; asking for a name may be
        answered from its memory of names that did not exist, for up to a minute.
        """
        names = {name for folder in self.folders() for name in _names_in(folder)}
        return Listing(
            recorded=frozenset(
                name.removesuffix(".json") for name in names if name.endswith(".json") and name[0] != "."
            ),
            claimed=frozenset(name[1:].removesuffix(".claim") for name in names if name.endswith(".claim")),
        )

    def read(self, unit: str) -> dict[str, Any]:
        return read_sealed_json(self.path(unit))

    def publish(self, unit: str, files: Sequence[FileRecord], summary: Mapping[str, Any]) -> None:
        record = {
            "unit": unit,
            "files": [file.to_json() for file in files],
            "summary": dict(summary),
            IDENTITY_FIELD: self._identity_sha256,
        }
        publish_json(self.path(unit), record, seal=True)

    def fault(self, unit: str) -> str | None:
        """Say why a unit is not complete, or None: no record, or a file that does not have its checksum."""
        if not self.path(unit).is_file():
            return f"unit {unit} has not been made"
        try:
            files = _files_of(self.read(unit))
        except DamagedDataError:
            return f"the record of unit {unit} is damaged"
        return next(filter(None, (fault_of_file(self._root, file) for file in files)), None)

    def mark_verified(self, unit: str) -> None:
        """Note that the unit's files were compared with their checksums just now."""
        os.utime(self.path(unit))

    def is_trusted(self, unit: str) -> bool:
        """Whether a unit is known to be whole without reading its files: a rank made or compared it in this
        run, its files have their sizes, and none was written to since."""
        path = self.path(unit)
        try:
            verified = path.stat().st_mtime
            states = [(file, (self._root / file.name).stat()) for file in _files_of(self.read(unit))]
        except (DamagedDataError, OSError):
            return False
        return verified >= self._trusted_from and all(
            state.st_size == file.bytes and state.st_mtime <= verified + _CLOCK_SECONDS
            for file, state in states
        )

    def read_all(self, units: Sequence[str]) -> tuple[list[FileRecord], dict[str, dict[str, Any]]]:
        """The files of all units, in their order, and each unit's summary: every record is read once, several
        at a time, because a network file system answers after a while."""
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            records = list(readers.map(self.read, units))
        files = [file for record in records for file in _files_of(record)]
        return files, {unit: record["summary"] for unit, record in zip(units, records, strict=True)}

    def refuse_other_bytes(self, unit: str, files: Sequence[FileRecord], *, is_read_here: bool) -> None:
        """A damaged unit must come out as it was: others were made from it.

        Args:
            unit: just made again.
            files: it has now.
            is_read_here: other units of this directory are made from it, not those of later stages alone.

        Raises:
            DamagedDataError: it has other bytes (another machine, library or number of threads). The former
                record stays, so that the next start refuses them too.
        """
        former = self.former_path(unit)
        try:
            if _files_of(read_sealed_json(former)) == list(files):
                return
        except DamagedDataError:  # none that can be read: nothing to compare with
            return
        run, stage = self._root.resolve().parent, self._root.resolve().name
        what = (
            "the other units here and what later stages made from this directory"
            if is_read_here
            else "what later stages made from this directory (no other unit here is made from it)"
        )
        raise DamagedDataError(
            f"unit {unit} of {self._root} was damaged and has other bytes when made again (another machine,"
            f" library or number of threads?). Run the same command where it was made, or restore"
            f" {', '.join(file.name for file in files[:3]) or 'its files'} and {former.name} (as {unit}.json)"
            f" from a copy. Or accept the new bytes, and make anew what depends on them, {what}: python"
            f" tools/inspect_run.py {shlex.quote(str(run))} --discard {shlex.quote(f'{stage}/{unit}')} --yes"
            " throws that away, and then the same commands make it"
        )


def recorded_files(root: Path, units: Sequence[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """(unit, the names of its files) of those units that have a record at `root`, which need not exist. For
    checks before a stage is opened: a record that cannot be read is left to the stage.

    Args:
        units: every unit of a phase, in the stage's order.
    """
    for number, unit in enumerate(units):
        with contextlib.suppress(DamagedDataError):  # also where there is none
            record = read_sealed_json(_record_path(root, folder_of(number, len(units)), unit))
            yield unit, frozenset(file.name for file in _files_of(record))


def _record_path(root: Path, folder: str, unit: str) -> Path:
    return root / "done" / folder / f"{unit}.json"


def _files_of(record: Mapping[str, Any]) -> list[FileRecord]:
    """The files of a unit.

    Raises:
        DamagedDataError: its list of files cannot be read.
    """
    try:
        return [FileRecord(**entry) for entry in record["files"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedDataError("a unit's record has no list of files that can be read") from error


def _names_in(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries)
    except FileNotFoundError:
        return


def missing_of(units: Collection[str], listing: Listing) -> list[str]:
    """The units without a record."""
    return [unit for unit in units if unit not in listing.recorded]
