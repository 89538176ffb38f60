"""Files that appear whole or not at all: a name for the time of writing (core/temporaries.py), fsync, rename;
and checksums of what was written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlpmem_ds.core.errors import FULL_DISK, DamagedDataError, UserError
from mlpmem_ds.core.names import is_name_inside
from mlpmem_ds.core.temporaries import temporary_path

SEAL = "content_sha256"
"""the field of a sealed JSON object that holds the SHA-256 of the canonical JSON of the others"""
MAX_JSON_BYTES = 1 << 26
"""of a file that is parsed whole; a list of 10,000 files has 2 MB"""
_REMEDY = "; run the stage that wrote it again, or restore it from a copy"
_OF_BAD_DISKS = (errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))
"""of a file with a bad sector, or whose file system finds its own checksums wrong: it is damaged"""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A published file: its name relative to the stage directory, its size and its checksum.

    Raises:
        ValueError: a field of another type, or a name that leads out of the directory; records are read from
            files and buckets that anyone may have written.
    """

    name: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if (type(self.name), type(self.bytes), type(self.sha256)) != (str, int, str):
            raise ValueError("a record whose name is no text, or whose size is no number")
        if not is_name_inside(self.name):
            raise ValueError(f"{self.name!r} names no file below its directory")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sha256_of_file(path: Path) -> str:
    with naming(path, _OF_BAD_DISKS), open(path, "rb") as stream:
        return (
            hashlib.file_digest(stream, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _sha256(stream)
        )


def _sha256(stream: Any) -> str:
    """hashlib.file_digest for Python 3.10."""
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, one-space indent, UTF-8, a final newline; no NaN.

    A byte of a path that is not UTF-8, which Python keeps as half of a surrogate pair, is the escape that
    JSON has for it, and is read back as it was.
    """
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def content_hash(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


@contextlib.contextmanager
def publish(path: Path, *, flush_folder: bool = True) -> Iterator[Path]:
    """Give a temporary path to write; on leaving, flush it to disk and rename it to `path`; on an error,
    remove it. The folder's names are flushed too, unless the caller does it for several files at once."""
    temporary = temporary_path(path)
    try:
        with naming(path):
            yield temporary
        flush(temporary)
        os.replace(temporary, path)
        if flush_folder:
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path, numbers: Collection[int] = FULL_DISK) -> Iterator[None]:
    """A full disk, or a bad one, knows its number only; give its error the name of the file."""
    try:
        yield
    except OSError as error:
        if error.errno in numbers and error.filename is None:
            error.filename = str(path)
        raise


def flush(path: Path) -> None:
    """Make a file's content, or a directory's names, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; a copy where the file system has no links, or is another one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def publish_bytes(path: Path, content: bytes) -> None:
    with publish(path) as temporary:
        temporary.write_bytes(content)


def publish_json(path: Path, value: Any, *, seal: bool = False) -> None:
    """Publish the canonical JSON of `value`; with `seal` (an object only) it carries its own checksum."""
    publish_bytes(path, sealed_json(value) if seal else canonical_json(value))


def sealed_json(value: Mapping[str, Any]) -> bytes:
    """The canonical JSON of an object with one field more: the SHA-256 of the canonical JSON without it."""
    plain = json.loads(canonical_json(value))  # as a reader sees it: keys are text, tuples lists
    return canonical_json({**plain, SEAL: content_hash(plain)})


def publish_array(path: Path, array: np.ndarray, *, flush_folder: bool = True) -> FileRecord:
    """Write `array` as .npy (never pickled); its record, hashed as it is written. `flush_folder` as in
    `publish`."""
    with publish(path, flush_folder=flush_folder) as temporary, open(temporary, "wb") as stream:
        # Not np.save: it writes past Python's streams, and then a full disk is an error without a number or a
        # name.
        hashed = HashedStream(stream)
        np.lib.format.write_array(hashed, array, allow_pickle=False)
    return hashed.record(path.name)


class HashedStream:
    """A binary file whose checksum is made of what is written to it, so that it need not be read again."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._digest, self._bytes = stream, hashlib.sha256(), 0

    def write(self, content: bytes | memoryview) -> int:
        """`content` as bytes: a view of one byte an item."""
        self._digest.update(content)
        self._bytes += len(content)
        return self._stream.write(content)

    def record(self, name: str) -> FileRecord:
        """Of the file, under this name, when all is written."""
        return FileRecord(name=name, bytes=self._bytes, sha256=self._digest.hexdigest())


def read_json(path: Path) -> Any:
    """Read a JSON file of ours; a seal is checked if there is one, and is not among the given fields.

    Raises:
        DamagedDataError: it is missing, does not parse, or does not have the checksum that it carries.
    """
    value = _parse(path)
    return _unsealed(path, value) if isinstance(value, dict) and SEAL in value else value


def read_json_object(path: Path) -> dict[str, Any]:
    """`read_json` of a file that holds an object. Raises DamagedDataError also for another value."""
    value = _object_in(path)
    return _unsealed(path, value) if SEAL in value else value


def read_sealed_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object that must be sealed: an identity, a record or a manifest.

    A larger file than `max_bytes` is damaged: it would be parsed into many times its size.

    Raises:
        DamagedDataError: it is missing, does not parse, or does not carry its checksum.
    """
    return _unsealed(path, _object_in(path, max_bytes))


def _object_in(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    value = _parse(path, max_bytes)
    if not isinstance(value, dict):
        raise DamagedDataError(f"{path} is damaged: not a JSON object{_REMEDY}")
    return value


def parse_sealed_json(content: bytes, where: str, *, remedy: str) -> dict[str, Any]:
    """As `read_sealed_json`, of bytes that are not in a file.

    Args:
        content: the bytes.
        where: they are from, for messages.
        remedy: for messages.

    Raises:
        DamagedDataError: they are no JSON object, or do not have their checksum.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedDataError(f"{where} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise DamagedDataError(f"{where} is damaged: not a JSON object; {remedy}")
    return _unsealed(where, value, remedy=f"; {remedy}")


def _parse(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    try:
        return json.loads(_content(path, max_bytes))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedDataError(f"{path} is missing") from error
    except OSError as error:
        if error.errno not in _OF_BAD_DISKS:
            raise
        raise DamagedDataError(f"{_unreadable(path, error)}{_REMEDY}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number that is none
        raise DamagedDataError(
            f"{path} is not valid JSON ({error}); restore it or remake its stage"
        ) from error


def _content(path: Path, max_bytes: int) -> bytes:
    """A file's bytes, if it can be one of ours; a pipe in its place is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as stream:
        content = stream.readall() or b""
    if len(content) > max_bytes:
        raise DamagedDataError(
            f"{path} is damaged: it has {len(content):,} bytes, and no file of its kind has more than"
            f" {max_bytes:,}{_REMEDY}"
        )
    return content


def _unsealed(path: Path | str, value: dict[str, Any], *, remedy: str = _REMEDY) -> dict[str, Any]:
    """The object without its seal, which must be right."""
    plain = {name: item for name, item in value.items() if name != SEAL}
    try:
        is_whole = value.get(SEAL) == content_hash(plain)
    except (ValueError, RecursionError):  # it holds what no file of ours does: NaN, half a surrogate pair
        is_whole = False
    if not is_whole:
        raise DamagedDataError(f"{path} is damaged: it does not have the checksum that it carries{remedy}")
    return plain


def record_file(root: Path, name: str) -> FileRecord:
    path = root / name
    return FileRecord(name=name, bytes=path.stat().st_size, sha256=sha256_of_file(path))


def fault_of_file(root: Path, record: FileRecord, *, checksum: bool = True) -> str | None:
    """Say what is wrong with a published file, or None: missing, another size, or (if asked) another
    checksum, or a disk that cannot read it."""
    path = root / record.name
    try:
        state = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        state = None
    except (OSError, ValueError) as error:  # a name that no file can have: too long, or half a surrogate pair
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise
        state = None
    if state is None or not stat.S_ISREG(state.st_mode):
        return f"{path} is missing"
    size = state.st_size
    if size != record.bytes:
        return f"{path} has {size} bytes where its record says {record.bytes}"
    if not checksum:
        return None
    try:
        sha256 = sha256_of_file(path)
    except OSError as error:
        if error.errno not in _OF_BAD_DISKS:
            raise
        return _unreadable(path, error)
    return None if sha256 == record.sha256 else f"{path} does not have the checksum of its record"


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path} cannot be read ({os.strerror(error.errno or 0)})"


_NUM_HASHERS = 4
_compared: set[int] = set()
"""hashes of (path, size, time, checksum) of files that had their checksums"""


def fault_of_content(root: Path, record: FileRecord) -> str | None:
    """`fault_of_file` with the checksum, for a file that is about to be used: what this process has compared,
    and no one has written to since, is not read again."""
    try:
        state = (root / record.name).stat()
    except (OSError, ValueError):
        return fault_of_file(root, record)
    seen = hash((str(root / record.name), state.st_ino, state.st_size, state.st_mtime_ns, record.sha256))
    if seen in _compared:
        return None
    fault = fault_of_file(root, record)
    if fault is None:
        _compared.add(seen)
    return fault


def first_fault(root: Path, records: Iterable[FileRecord]) -> str | None:
    """`fault_of_content` of several files, some at a time: hashing needs no lock of Python's."""
    chosen = list(records)
    if len(chosen) < 2:
        return next(filter(None, (fault_of_content(root, record) for record in chosen)), None)
    hashers = ThreadPoolExecutor(min(_NUM_HASHERS, len(chosen), os.cpu_count() or 1))
    try:
        return next(filter(None, hashers.map(partial(fault_of_content, root), chosen)), None)
    finally:
        hashers.shutdown(cancel_futures=True)


def require_free_bytes(
    path: Path, needed: int, *, what: str, remedy: str = "free some space or choose another --output"
) -> None:
    """Refuse to start where the disk cannot hold the result.

    Args:
        path: where it will be written; it need not exist.
        needed: bytes.
        what: needs them, in the plural, for the message.
        remedy: what to do about it.

    Raises:
        UserError: with both numbers.
    """
    existing = next(parent for parent in (path, *path.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{what} need {size_in_words(needed)}, and {existing} has {size_in_words(free)} free: {remedy}"
        )


def size_in_words(num_bytes: int) -> str:
    """Of a file or a disk, in the unit that shows it: `1.40 GB`, `0.31 MB`, `12 bytes`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size or (unit == "MB" and num_bytes >= 1e4):
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} bytes"
