"""Read webdataset tars, and other tars of text files, as documents: see archive_samples.py for their names.

A tar has a checksum for each header and none for the data; it must end with a block of zeros. Tars that were
joined are read one after another. A link to a file of the archive has the content of that file.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.archive_samples import Member, is_read, omission_of, sample_records
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules, Record
from mlpmem_ds.formats.streams import DamagedStreamError, opened

MAX_LINKED_BYTES = 1 << 28
"""of files of one archive to which links point: they are held in memory"""
_BUFFER = 1 << 14  # tarfile copies what is left of it at each read
_NO_FILES = (b"V", b"D")  # GNU tar's label of a volume, and the list of a folder
_MAX_LINKS = 40  # of one that points to another


def read_tar(path: Path, rules: ReadRules) -> Iterator[Record | Omission]:
    """The documents of an archive, in the order of its members.

    Raises:
        UserError: it is cut short or damaged, or a member is not what its name says.
    """
    with opened(path) as stream:
        yield from sample_records(path, _members(path, stream), rules)


def _members(path: Path, stream: BinaryIO) -> Iterator[Member | Omission]:
    linked: dict[str, bytes] | None = None
    for entry, content in _entries(path, stream, lambda entry: entry.isreg() and is_read(entry.name)):
        if content is not None:
            yield Member(name=entry.name, content=content)
        elif (entry.islnk() or entry.issym()) and is_read(entry.name):
            linked = _linked_contents(path) if linked is None else linked
            content = linked.get(posixpath.normpath(entry.name))
            yield (
                Omission(name=entry.name, reason="broken link", detail=entry.linkname)
                if content is None
                else Member(name=entry.name, content=content)
            )
        elif entry.isreg() or entry.islnk() or entry.issym():
            yield omission_of(entry.name)
        elif entry.isdev():
            yield Omission(name=entry.name, reason="special file")
        elif not entry.isdir() and entry.type not in _NO_FILES:
            yield omission_of(entry.name, kind=f"of type {ascii(entry.type)[1:]}")


def _linked_contents(path: Path) -> dict[str, bytes]:
    """The content of each link whose name says text or JSON, where its file is in the archive.

    Links are rare; an archive that has them is read twice more.
    """
    links: dict[str, str] = {}
    with opened(path) as stream:
        for entry, _ in _entries(path, stream, lambda entry: False):
            name = posixpath.normpath(entry.name)
            if entry.islnk():
                links[name] = posixpath.normpath(entry.linkname)
            elif entry.issym():
                links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), entry.linkname))
    target_of = {name: _target(name, links) for name in links if is_read(name)}
    targets, contents, size = set(target_of.values()), dict[str, bytes](), 0

    def is_target(entry: tarfile.TarInfo) -> bool:
        return entry.isreg() and posixpath.normpath(entry.name) in targets

    with opened(path) as stream:
        for entry, content in _entries(path, stream, is_target):
            if content is not None:
                contents[posixpath.normpath(entry.name)] = content
                if (size := size + len(content)) > MAX_LINKED_BYTES:
                    raise UserError(
                        f"{path} has links to files of more than {MAX_LINKED_BYTES:,} bytes, which are held"
                        " in memory: unpack it and give the folder"
                    )
    return {name: contents[target] for name, target in target_of.items() if target in contents}


def _target(name: str, links: dict[str, str]) -> str:
    for _ in range(_MAX_LINKS):
        if name not in links:
            break
        name = links[name]
    return name


def _entries(
    path: Path, stream: BinaryIO, is_needed: Callable[[tarfile.TarInfo], bool]
) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The headers, each with its content where that is needed."""
    last = ""
    try:
        with _Archive.open(fileobj=stream, mode="r|", bufsize=_BUFFER) as archive:
            while (entry := archive.next()) is not None:
                archive.members.clear()  # it would remember them all
                last = entry.name
                file = archive.extractfile(entry) if is_needed(entry) else None
                yield entry, None if file is None else file.read()
    except DamagedStreamError:  # of the compressed data: `opened` says where
        raise
    except _TrailingBytesError as error:
        raise UserError(
            f"{path} has bytes after its end, after member {last!r}, that are no tar ({error}): cut them off"
            " or restore the file"
        ) from error
    except (tarfile.TarError, ValueError, OverflowError) as error:
        place = f"after member {last!r}" if last else "before its first member"
        raise UserError(
            f"{path} is cut short or damaged {place} ({error}): restore it or leave it out"
        ) from error


class _Entry(tarfile.TarInfo):
    """A header of an archive. What is no header is an error: tarfile would end there, or skip it, without a
    word."""

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> Any:
        try:
            entry = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            # A block of zeros: the end, or the gap between joined tars.
            tarfile_.is_ended = True
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            if tarfile_.is_ended:
                raise
            raise tarfile.ReadError("it has no end-of-archive block") from error
        except tarfile.HeaderError as error:
            kind = _TrailingBytesError if tarfile_.is_ended else tarfile.ReadError
            raise kind(str(error)) from error
        tarfile_.is_ended = False
        return entry


class _TrailingBytesError(tarfile.ReadError):
    """What follows the end of an archive is no other archive."""


class _Archive(tarfile.TarFile):
    """An archive, or several that were joined, as `tar --ignore-zeros` reads them."""

    tarinfo = _Entry
    ignore_zeros = True
    encoding = "utf-8"  # of names, on every machine; other bytes of them are kept
    members: list[Any]
    is_ended = False
