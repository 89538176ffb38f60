"""Read webdataset tars as documents: the members that share a name up to the first dot are one sample.

A text member is one whose name ends in `.txt`, `.text` or `.md`. Of the sample KEY, the member `KEY.txt`
(else `KEY.text`, `KEY.md`) is the document KEY; every other text member, such as `22.05.txt`, `KEY.seg.txt`
or a second text, is a document of its own, named by the whole member.
`NAME.json` has the fields of `NAME.txt`, `KEY.json` of all that have none; where a sample has no text member,
the document is the text of its JSON.

A tar has a checksum for each header and none for the data; it must end with a block of zeros. Tars that were
joined are read one after another.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.json_lines import NotJsonError, parse_json
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules, Record, record_of
from mlpmem_ds.formats.streams import DamagedStreamError, opened

_TEXTS = ("txt", "text", "md")  # the first of a sample is its main text
_BUFFER = 1 << 14  # tarfile copies what is left of it at each read


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A text or JSON file of an archive; `stem` and `extension` (in small letters) part at the last dot."""

    name: str
    stem: str
    extension: str
    content: bytes


def read_tar(path: Path, rules: ReadRules) -> Iterator[Record | Omission]:
    """The documents of an archive, in the order of its members. See above for their names."""
    with opened(path) as stream:
        key, sample = "", list[_Member]()
        for member in _members(path, stream):
            if _key_of(member.name) != key:
                yield from _records(path, key, sample, rules)
                key, sample = _key_of(member.name), []
            sample.append(member)
        yield from _records(path, key, sample, rules)


def _key_of(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _members(path: Path, stream: BinaryIO) -> Iterator[_Member]:
    """The text and JSON members, each whole in memory; the others are passed over."""
    last = ""
    try:
        with _Archive.open(fileobj=stream, mode="r|", bufsize=_BUFFER) as archive:
            while (entry := archive.next()) is not None:
                archive.members.clear()  # it would remember them all
                last = entry.name
                stem, _, extension = entry.name.rpartition(".")
                file = archive.extractfile(entry) if entry.isreg() else None
                if file is not None and extension.lower() in (*_TEXTS, "json"):
                    yield _Member(
                        name=entry.name, stem=stem, extension=extension.lower(), content=file.read()
                    )
    except DamagedStreamError:  # of the compressed data: `opened` says where
        raise
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} is cut short or damaged after member {last!r} ({error}): restore it or leave it out"
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
            after = "after its end: " if tarfile_.is_ended else ""
            raise tarfile.ReadError(f"{after}{error}") from error
        tarfile_.is_ended = False
        return entry


class _Archive(tarfile.TarFile):
    """An archive, or several that were joined, as `tar --ignore-zeros` reads them."""

    tarinfo = _Entry
    ignore_zeros = True
    members: list[Any]
    is_ended = False


def _records(path: Path, key: str, sample: list[_Member], rules: ReadRules) -> Iterator[Record | Omission]:
    """The documents of one sample."""
    text_field, group_field = rules.text_field, rules.group_field
    objects = [(member, _parsed(path, member)) for member in sample if member.extension == "json"]
    fields = {member.stem: values for member, values in objects}
    texts = [member for member in sample if member.extension in _TEXTS]
    own = [member for member in texts if member.stem == key]
    main = min(own, key=lambda member: _TEXTS.index(member.extension), default=None)
    for member in texts:
        values = fields.get(member.stem, fields.get(key))
        values = {**(values if isinstance(values, Mapping) else {}), text_field: _decoded(path, member)}
        name = key if member is main else member.name
        yield record_of(path, f"member {member.name!r}", name, values, text_field, group_field)
    if texts:
        return
    for member, values in objects:
        name = key if member.stem == key else member.name
        yield record_of(path, f"member {member.name!r}", name, values, text_field, group_field)


def _decoded(path: Path, member: _Member) -> str:
    try:
        return member.content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} member {member.name!r} is not UTF-8 text ({error}): mend it or leave the file out"
        ) from error


def _parsed(path: Path, member: _Member) -> Any:
    try:
        return parse_json(_decoded(path, member))
    except NotJsonError as error:
        raise UserError(
            f"{path} member {member.name!r} is not JSON ({error}): mend it or leave the file out"
        ) from error
