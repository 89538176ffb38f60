"""What is read from URLs, on a local disk, up to a size.

    CACHE/<listing>/<name>/        a directory as the mirror has it; <listing>: of its `.mirror/files.json`
    CACHE/<listing>/.mlpmem-cache  the mark of a directory that the cache has made; no other one is removed
    CACHE/<listing>/source.json    {url, patterns, num_files, num_bytes, reserved}; its time is the last use
    CACHE/<listing>/.compared      its time: when all its files had their checksums
    CACHE/<listing>/.use-*.claim   one of each process that uses it, for as long as it lives
    CACHE/.room.claim              of the process that is making room
    CACHE/.mlpmem-dropped-*        a directory that is being removed

Where room is needed, what was used longest ago goes first: directories that no live process uses, and of
those in use the files that are fetched on demand and were not read for ten minutes (they are fetched again
if they are). A file that a process has open stays readable for it in any case. Two URLs of the same content
share one directory, named after the first of them; a mirror that was pushed anew is another one.

No file is believed because it is there: whoever opens a directory compares its files with the checksums of
the mirror's list, one process for those of a machine that wait meanwhile, and a file on demand is compared by
each process that opens it. What differs is fetched again, so the same command mends a damaged cache.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlpmem_ds.core.claims import ClaimWatch, claim
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import (
    FileRecord,
    fault_of_content,
    fault_of_file,
    publish_json,
    read_sealed_json,
    require_free_bytes,
    size_in_words,
)
from mlpmem_ds.core.manifest import is_own_directory
from mlpmem_ds.core.names import is_name_inside
from mlpmem_ds.core.objects import homes, on_demand
from mlpmem_ds.core.objects.fetch import (
    HALF,
    bytes_to_write,
    fetch_file,
    fetch_files,
    not_whole,
    partial_path,
)
from mlpmem_ds.core.objects.homes import Held, Source
from mlpmem_ds.core.objects.listing import Listing, require_listing
from mlpmem_ds.core.objects.locks import PathLocks
from mlpmem_ds.core.objects.store import Store
from mlpmem_ds.core.objects.urls import name_of_url
from mlpmem_ds.core.temporaries import time_of_file_system
from mlpmem_ds.core.typed_json import to_json
from mlpmem_ds.core.waiting import Patience

_logger = logging.getLogger(__name__)

PLACE, SIZE = "MLPMEM_CACHE", "MLPMEM_CACHE_BYTES"
"""variables of the environment: its directory, and how many bytes it may hold"""
_DEFAULT_BYTES = 100_000_000_000
_SECONDS_IN_USE = 600.0
"""a file that was opened since then is in use"""
_SECONDS_BETWEEN_MARKS = 60.0
_SOURCE, _COMPARED = on_demand.SOURCE, ".compared"
_IDENTITY = "identity.json"
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class _Droppable:
    used: float
    num_bytes: int
    path: Path


_locks = PathLocks()


class Cache:
    """A directory on a local disk that holds at most `max_bytes` of what was fetched."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root, self.max_bytes = root, max_bytes
        self._marked: dict[Path, float] = {}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Cache:
        """
        Raises:
            UserError: the size is no number.
        """
        place = environment.get(PLACE)
        caches = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        size = environment.get(SIZE) or str(_DEFAULT_BYTES)
        try:
            max_bytes = int(float(size))
        except (ValueError, OverflowError) as error:
            raise UserError(f"{SIZE}={size} is no number of bytes, such as 500e9") from error
        root = Path(place) if place else Path(caches, "mlpmem-ds")
        return cls(root.absolute(), max_bytes)

    def open(self, url: str, held: contextlib.ExitStack, *, flag: str) -> Path:
        """The directory of a URL, as a local one: complete, but for what is fetched when it is read.

        Args:
            url: of a whole mirror.
            held: until it is closed the directory is in use.
            flag: how the user named it, for messages.

        Raises:
            UserError: no whole mirror, the store's refusal, or more bytes than the cache may hold.
            DamagedDataError: an object is not what the mirror's list says.
        """
        store = Store(url)
        listing = require_listing(store, flag=flag)
        home = self.root / listing.sha256[:16]
        with self._saying_whose():
            with self._one_at_a_time(self.root / ".room.claim"):
                held.enter_context(homes.use(home))
            start, asked = time.monotonic(), time_of_file_system(home)
            with self._one_at_a_time(home / ".fetch.claim"):
                root = home / _name_in(home, store)
                source, fetched = self._fill(store, listing, home, root, asked=asked)
        if fetched:
            rest = "" if not source.patterns else "; the rest when it is read"
            _logger.info(
                "%s %s: %s in %.1f s to %s%s",
                flag,
                url,
                size_in_words(fetched),
                time.monotonic() - start,
                root,
                rest,
            )
        if source.patterns:
            on_demand.register(root, lambda record: self._ensure(store, record, root, source.patterns))
            held.callback(on_demand.forget, root)
        return root

    def _fill(
        self, store: Store, listing: Listing, home: Path, root: Path, *, asked: float
    ) -> tuple[Source, int]:
        """Fetch what is not whole of a directory; where it is from, and the bytes that were fetched. What
        another process has compared since this one `asked` is not compared again."""
        identity = listing.find(_IDENTITY)
        if identity is not None and fault_of_content(root, identity):
            _warn_of_damage(root, identity)
            fetch_file(store, identity, root)
        patterns = on_demand.PATTERNS.get(_format_of(root), ())
        records = [record for record in listing.files if not on_demand.is_on_demand(record.name, patterns)]
        is_compared = _was_compared_since(home, asked)
        if is_compared:
            missing = [record for record in records if fault_of_file(root, record, checksum=False)]
        else:
            missing = not_whole(root, records)
        for record in missing:
            _warn_of_damage(root, record)
        source = Source(
            url=store.url,
            name=root.name,
            patterns=patterns,
            num_files=len(listing.files),
            num_bytes=listing.num_bytes,
            reserved=sum(record.bytes for record in records),
        )
        with self._room_for(missing, root, what=store.url):
            publish_json(home / _SOURCE, to_json(source), seal=True)
        fetch_files(store, missing, root)
        if not is_compared:  # sizes alone are no comparison, on which those who asked meanwhile may rely
            (home / _COMPARED).touch()
        return source, sum(record.bytes for record in missing)

    def _ensure(self, store: Store, record: FileRecord, root: Path, patterns: tuple[str, ...]) -> None:
        """Fetch a file on demand, or note that it was used."""
        if not on_demand.is_on_demand(record.name, patterns):
            return
        path = root / record.name
        if self._is_whole_and_kept(root, record):
            return
        with self._saying_whose(), self._one_at_a_time(path.with_name(f".{path.name}.claim")):
            if not self._is_whole_and_kept(root, record):
                _warn_of_damage(root, record)
                with self._room_for([record], root, what=f"{store.url}/{record.name}"):
                    partial_path(path, record).touch()  # its name reserves the room
                fetch_file(store, record, root)

    def _is_whole_and_kept(self, root: Path, record: FileRecord) -> bool:
        """Note that a file on demand is used; whether it has its checksum, which the reader does not compare
        again in this process."""
        path, now = root / record.name, time.monotonic()
        if now - self._marked.get(path, float("-inf")) > _SECONDS_BETWEEN_MARKS:
            with contextlib.suppress(OSError):  # first: comparing takes seconds, in which it may be dropped
                os.utime(path, (time.time(), path.stat().st_mtime))
                self._marked[path] = now
        return not fault_of_content(root, record) and path.exists()

    @contextlib.contextmanager
    def _saying_whose(self) -> Iterator[None]:
        """A place that no flag of the command has named is explained."""
        try:
            yield
        except OSError as error:
            place = Path(error.filename or "")
            is_of_cache = place in (self.root, *self.root.parents) or self.root in place.parents
            if error.errno not in _NOT_WRITABLE or not is_of_cache:
                raise
            raise UserError(
                f"{os.strerror(error.errno or 0)}: {error.filename}, in the cache of what is read from URLs:"
                f" set {PLACE} to a directory with room that can be written, or free some space"
            ) from error

    @contextlib.contextmanager
    def _one_at_a_time(self, path: Path) -> Iterator[None]:
        """This thread alone, of all threads and processes of the machine, as far as claims go."""
        path.parent.mkdir(parents=True, exist_ok=True)
        watch, patience = ClaimWatch(), Patience()
        with _locks.of(path):
            while True:
                with claim(path, watch=watch) as is_mine:
                    if is_mine:
                        yield
                        return
                patience.log("waiting for another process at %s", path)
                time.sleep(min(patience.pause_seconds, 1.0))

    @contextlib.contextmanager
    def _room_for(self, records: Sequence[FileRecord], root: Path, *, what: str) -> Iterator[None]:
        """Drop what was used longest ago until files fit that are to be fetched into `root`; what is reserved
        inside counts for others. What an earlier fetch has left of the files is not dropped for them.

        Raises:
            UserError: they do not fit next to what is in use.
        """
        needed = sum(record.bytes for record in records)
        if needed == 0:
            yield
            return
        with self._one_at_a_time(self.root / ".room.claim"):
            self._drop_remains()
            held = self.contents()
            total = sum(each.num_bytes for each in held) - homes.counted_already(held, root, records)
            is_full, spared = total + needed > self.max_bytes, homes.paths_of(root, records)
            asked = time.time()
            for candidate in self._droppable(held, spared) if is_full else ():
                if candidate.path.is_file() and _was_used_since(candidate.path, asked):
                    continue  # while others were removed
                _logger.info("dropping %s from the cache", candidate.path.relative_to(self.root))
                _remove(candidate.path)
                total -= candidate.num_bytes
                if total + needed <= self.max_bytes:
                    break
            if total + needed > self.max_bytes:
                raise UserError(
                    f"{what} needs {size_in_words(needed)} in the cache {self.root}, which may hold"
                    f" {size_in_words(self.max_bytes)} and has {size_in_words(total)} in use: set {SIZE}"
                    f" higher, or {PLACE} to a larger disk"
                )
            require_free_bytes(
                self.root,
                bytes_to_write(root, records),
                what=what,
                remedy=f"free some space, or set {PLACE}",
            )
            yield

    def _droppable(self, held: list[Held], spared: set[Path]) -> list[_Droppable]:
        """What may be dropped, in the order in which it is; no file that is `spared`."""
        found = [
            _Droppable(used=each.used, num_bytes=each.num_bytes, path=each.home)
            for each in held
            if not each.is_in_use
        ]
        now = time.time()
        for each in held:
            root = each.home / each.source.name
            for path in homes.files_below(root) if each.is_in_use and each.source.patterns else ():
                name = path.relative_to(root).as_posix()
                is_half = path.suffix == HALF  # of a fetch that was interrupted, if it is that old
                is_candidate = is_half or on_demand.is_on_demand(name, each.source.patterns)
                if not is_candidate or path in spared:
                    continue
                with contextlib.suppress(FileNotFoundError):  # finished in this moment
                    if not _was_used_since(path, now - _SECONDS_IN_USE):
                        used = 0.0 if is_half else path.stat().st_atime
                        found.append(_Droppable(used=used, num_bytes=homes.bytes_of(path), path=path))
        return sorted(found, key=lambda candidate: candidate.used)

    def _drop_remains(self) -> None:
        """Remove directories whose removal or first fetch was interrupted: no process knows them."""
        for home in list(self.root.iterdir()):
            if homes.is_remains(home):
                _logger.info("dropping %s from the cache, the rest of an interrupted fetch", home.name)
                _remove(home)

    def contents(self) -> list[Held]:
        """What the cache holds, the latest use first."""
        return homes.contents(self.root)


def _name_in(home: Path, store: Store) -> str:
    """Of the one directory in `home`: that of the URL by which it was first opened."""
    source = homes.source_of(home)
    if source is not None:
        return source.name
    name = name_of_url(store.url)
    return name if is_name_inside(name) else store.scheme


def _was_compared_since(home: Path, asked: float) -> bool:
    """Both times are of the clock that gives files there their times."""
    try:
        return (home / _COMPARED).stat().st_mtime > asked
    except FileNotFoundError:
        return False


def _was_used_since(path: Path, since: float) -> bool:
    """Whether a file was read or written since then; False where it is gone."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return False
    return max(state.st_atime, state.st_mtime) > since


def _warn_of_damage(root: Path, record: FileRecord) -> None:
    """Of a file that is there and is not what it was."""
    if (path := root / record.name).exists():
        _logger.warning("%s in the cache is damaged: fetching it again", path)


def _format_of(root: Path) -> str:
    """Of a stage of ours, such as "corpus"; "" of any other directory."""
    if not is_own_directory(root, _IDENTITY):
        return ""
    return str(read_sealed_json(root / _IDENTITY)["format"]).removeprefix("mlpmem-")


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.startswith(
        homes.DROPPED
    ):  # first: half of it is not believed, and the mark is removed too
        path = path.rename(path.with_name(f"{homes.DROPPED}{path.name}-{secrets.token_hex(4)}"))
    shutil.rmtree(path, ignore_errors=True)
