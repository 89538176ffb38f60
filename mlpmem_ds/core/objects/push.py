"""A directory to a URL: its files, then what makes it complete, then the list of all (`listing.py`).

Finished units of a stage that is still at work are sent behind it: a unit's files and then its record, as the
stage itself publishes them. What a complete stage makes anew from its units, such as a report with another
grid, is sent again; units of other bytes are refused.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import FileRecord, fault_of_content, fault_of_file, record_file
from mlpmem_ds.core.objects.contents import LocalDirectory, is_for_people
from mlpmem_ds.core.objects.journal import Journal
from mlpmem_ds.core.objects.listing import (
    LAST_FILES,
    Listing,
    begin,
    publish_listing,
    read_listing,
    require_same,
    withdraw,
)
from mlpmem_ds.core.objects.parts import in_order, send_file
from mlpmem_ds.core.objects.store import Store

_logger = logging.getLogger(__name__)
THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push did; `is_whole`: the mirror has all of a complete directory."""

    num_files: int
    num_bytes: int
    seconds: float
    is_whole: bool


class Push:
    """A directory and its mirror. `send` may be called again and again while a stage is at work.

    Args:
        directory: to mirror.
        store: where.
        threads: that send at once.
        replace: send all anew where the URL has a whole mirror, or that of another directory.

    `of` is what tells the directory from others (`LocalDirectory.of`), when the push began.

    Raises:
        UserError: the URL is another directory's mirror, or holds other bytes.
        DamagedDataError: with `replace`, the directory lacks a file that it lists.
    """

    def __init__(
        self, directory: LocalDirectory, store: Store, *, threads: int = THREADS, replace: bool = False
    ) -> None:
        self._directory, self._store, self._threads = directory, store, threads
        self.of = directory.of()
        self._journal = Journal(directory.root, store.url)
        self._count = threading.Lock()
        self._num_files = self._num_bytes = 0
        self._names: list[str] = []
        self._former: Listing | None = None
        try:
            self._former = self._open()
        except UserError:
            if not replace:
                raise
            self._begin_anew()
        else:
            if self._former is None:
                self._journal.read(store.sizes())
            elif replace and directory.is_complete:
                self._begin_anew()

    def _begin_anew(self) -> None:
        """Take away what says that the mirror is whole; no object that is there is believed."""
        self._require_all()
        _logger.warning("%s: all files are sent again, in place of what it holds", self._store.url)
        self._refuse_another_directory()  # a checkpoint that is removed meanwhile stays in the store
        self._former = None
        self._journal.remove()
        withdraw(self._store)
        begin(self._store, self.of, name=str(self._directory.root))

    def _open(self) -> Listing | None:
        """The mirror of this very directory, if it is whole; of none a new one is begun."""
        listing = read_listing(self._store)
        if listing is None:
            begin(self._store, self.of, name=str(self._directory.root))
            return None
        require_same(self._store, listing.of, self.of, name=str(self._directory.root))
        self._refuse_other_bytes(listing)
        return listing

    @property
    def is_whole(self) -> bool:
        """Whether the mirror has all of a complete directory, as it was at the last `send`."""
        return self._former is not None and self._directory.is_complete

    def _refuse_other_bytes(self, listing: Listing) -> None:
        own = self._directory.recorded()
        for record in listing.files:
            if record.name in own and own[record.name] != record:
                raise UserError(
                    f"{self._store.url} holds another {record.name} than {self._directory.root} ("
                    f"{record.sha256[:12]} and {own[record.name].sha256[:12]}), of the same flags and inputs:"
                    " choose another URL, or --replace what is there"
                )

    def _is_made_anew(self, listing: Listing) -> bool:
        """Whether files of a complete directory that its own list does not name are others than the mirror's:
        changed, more, or fewer. A plain one would be another directory."""
        if self._directory.kind == "plain" or not self._directory.is_complete:
            return False
        own = self._directory.recorded()
        names = {name for name in self._directory.names() if not (name in own or is_for_people(name))}
        listed = {
            record.name: record
            for record in listing.files
            if not (record.name in own or is_for_people(record.name))
        }
        return names != listed.keys() or any(
            fault_of_content(self._directory.root, record) for record in listed.values()
        )

    def _reopen(self) -> None:
        """Take away what says that the mirror is whole, unless another push has sent the same meanwhile. The
        objects of its list are believed: what differs is sent.

        Raises:
            DamagedDataError: as `_require_all`, or a unit's record is gone.
        """
        self._require_all()
        self._former = listing = self._open()
        if listing is None:
            self._journal.read(self._store.sizes())
            return
        if not self._is_made_anew(listing):
            return
        self._name_what_goes(listing)
        _logger.info("%s: files were made anew since it was sent: sending them", self._directory.root)
        for record in listing.files:
            self._journal.note(record)
        self._refuse_another_directory()
        withdraw(self._store)
        begin(self._store, self.of, name=str(self._directory.root))
        self._former = None

    def _require_all(self) -> None:
        """
        Raises:
            DamagedDataError: the directory lacks a file of its own list or of a unit, which the mirror would
                lack too, or a unit's record is damaged.
        """
        self._require(self._directory.recorded().values())
        for unit in self._directory.units():
            self._require(unit.files)

    def _require(self, records: Iterable[FileRecord]) -> None:
        """Files must be there with their sizes; checksums are compared as they are sent."""
        for record in records:
            if fault := fault_of_file(self._directory.root, record, checksum=False):
                self._refuse_another_directory()  # one that was removed meanwhile is not damaged either
                raise DamagedDataError(
                    f"{fault}: run the command that wrote it again, or restore it from a copy or a mirror"
                )

    def _name_what_goes(self, listing: Listing) -> None:
        """Say what the new list will lack.

        Raises:
            DamagedDataError: the record of a unit.
        """
        root = self._directory.root
        gone = [record.name for record in listing.files if not (root / record.name).exists()]
        if lost := [name for name in gone if name.startswith("done/")]:
            raise DamagedDataError(
                f"{root / lost[0]} is gone, which {self._store.url} has: fetch the directory from its mirror"
            )
        if gone:
            _logger.warning(
                "%s has no %s any more (%d such files): the mirror's list drops them",
                *(root, gone[0], len(gone)),
            )

    def _refuse_another_directory(self) -> None:
        """One that has taken the place since the push began. A plain one would be read once more for it.

        Raises:
            FileNotFoundError: the list of a checkpoint or an export is gone.
        """
        if self._directory.kind != "plain" and self._directory.of() != self.of:
            raise UserError(
                f"{self._directory.root} is another directory than when its push began: it was made anew with"
                " other flags or inputs; send it again, with --replace"
            )

    def send(self) -> Pushed:
        """Send all that is final and not there yet; of a complete directory then the list, after which the
        mirror is whole.

        Raises:
            DamagedDataError: the directory lacks a file that it lists, or one is not what its record says.
            UserError: the store's refusal, or another directory has taken the place.
            FileNotFoundError: a checkpoint or an export was removed meanwhile.
        """
        start, self._num_files, self._num_bytes = time.monotonic(), 0, 0
        is_complete = self._directory.is_complete
        if self._former is not None:
            self._refuse_other_bytes(self._former)
            if self._is_made_anew(self._former):
                self._reopen()
        elif is_complete:
            self._require_all()
        if self._former is None:  # nothing is changed below a list that says what is there
            with ThreadPoolExecutor(self._threads) as pool:
                self._send_all(pool, self._in_units())
                self._send_all(pool, self._records_of_units())
                if is_complete:
                    self._names = self._directory.names()
                    self._send_all(pool, self._others())
            if is_complete:
                self._complete()
        return Pushed(
            num_files=self._num_files,
            num_bytes=self._num_bytes,
            seconds=time.monotonic() - start,
            is_whole=self.is_whole,
        )

    def _in_units(self) -> Iterator[tuple[str, FileRecord | None]]:
        for unit in self._directory.units():
            unsent = [record for record in unit.files if not self._journal.has(record)]
            self._require(unsent)
            yield from ((record.name, record) for record in unsent)

    def _records_of_units(self) -> Iterator[tuple[str, FileRecord | None]]:
        """Of the units whose files are all there."""
        for unit in self._directory.units():
            if all(map(self._journal.has, unit.files)):
                yield from self._changed(unit.record_path.relative_to(self._directory.root).as_posix())

    def _others(self) -> Iterator[tuple[str, FileRecord | None]]:
        """What no unit names, but for the last files."""
        own = self._directory.recorded()
        for name in self._names:
            if name in LAST_FILES:
                continue
            if name in own:
                yield from ((name, record) for record in [own[name]] if not self._journal.has(record))
            else:
                yield from self._changed(name)

    def _changed(self, name: str) -> Iterator[tuple[str, FileRecord | None]]:
        """The file, unless it is there as it is now."""
        record = record_file(self._directory.root, name)
        if not self._journal.has(record):
            # A log may grow while it is sent.
            yield name, None if is_for_people(name) else record

    def _send_all(self, pool: ThreadPoolExecutor, files: Iterable[tuple[str, FileRecord | None]]) -> None:
        for _ in in_order(pool, self._send_one, files, ahead=2 * self._threads):
            pass

    def _send_one(self, file: tuple[str, FileRecord | None]) -> None:
        name, expected = file
        record = send_file(self._store, name, self._directory.root / name, expected)
        self._journal.note(record)
        with self._count:
            self._num_files += 1
            self._num_bytes += record.bytes

    def _complete(self) -> None:
        """The last files and the list, once the store has all the others."""
        sizes = self._store.sizes()
        sent = {record.name: record for record in self._journal.records}
        own = self._directory.recorded()
        for name in self._names:
            record = sent.get(name)
            if name in LAST_FILES:
                continue
            if record is None or sizes.get(name) != record.bytes or own.get(name, record) != record:
                raise UserError(
                    f"{self._store.url}/{name} is missing, or not what was sent: does another program write"
                    " there? The same command sends it again"
                )
        for name in (name for name in self._names if name in LAST_FILES):
            self._send_one((name, None))
        self._refuse_another_directory()
        records = {record.name: record for record in self._journal.records}
        publish_listing(self._store, self.of, [records[name] for name in self._names])
        self._journal.remove()
        self._former = read_listing(self._store)
