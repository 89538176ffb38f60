"""Read zip archives of text files as documents: see archive_samples.py for their names.

Every member that is read has a checksum; the archive's directory must stand at its end.
"""

from __future__ import annotations

import errno
import lzma
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.archive_samples import Member, is_read, omission_of, sample_records
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules, Record

_END = b"PK\x05\x06"
_NUM_END_BYTES = 22  # without the comment
_MANY = 0xFFFF  # members: their number stands elsewhere
_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, OverflowError),
    *(NotImplementedError, struct.error, OSError),
)


def read_zip(path: Path, rules: ReadRules) -> Iterator[Record | Omission]:
    """The documents of an archive, in the order of its directory.

    Raises:
        UserError: it is cut short, damaged, joined with another or encrypted, or a member is not what its
            name says.
    """
    with open(path, "rb") as file:
        yield from sample_records(path, _members(path, file), rules)


def _members(path: Path, file: BinaryIO) -> Iterator[Member | Omission]:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_ends(path, file, archive)
            for entry in entries:
                if entry.filename.endswith("/") and not entry.file_size:  # a folder
                    continue
                if stat.S_ISLNK(entry.external_attr >> 16):
                    yield omission_of(entry.filename, kind="a link")
                elif not is_read(entry.filename):
                    yield omission_of(entry.filename)
                else:
                    yield Member(name=entry.filename, content=_content(path, archive, entry))
    except UserError:
        raise
    except _ERRORS as error:
        # bz2's errors have no number; EINVAL is a place that no file has.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise UserError(
            f"{path} is cut short or damaged, or no zip archive ({error}): restore it or leave it out"
        ) from error


def _content(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(entry)
    except (RuntimeError, NotImplementedError) as error:  # encrypted; compressed in another way
        raise UserError(
            f"{path} member {entry.filename!r} cannot be read ({error}): unpack the archive and give"
            " the folder"
        ) from error


def _check_ends(path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> None:
    """Zip's readers find the last archive of a file, and pass over what stands before and after it, and over
    members that its directory no longer has."""
    file.seek(-min(path.stat().st_size, _NUM_END_BYTES + len(archive.comment)), 2)
    end = file.read(_NUM_END_BYTES)
    is_last = end.startswith(_END)
    num_members = int.from_bytes(end[10:12], "little")
    if is_last and num_members not in (len(archive.infolist()), _MANY):
        raise zipfile.BadZipFile(f"its directory has {len(archive.infolist())} of {num_members} members")
    first = min((entry.header_offset for entry in archive.infolist()), default=0)
    if not is_last or first > 0:
        raise UserError(
            f"{path} has bytes {'before' if is_last else 'after'} its zip archive, perhaps another that was"
            " joined to it: separate them, or unpack it and give the folder"
        )
