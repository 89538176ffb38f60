"""Documents of files: text and source code, JSON lines, Parquet, webdataset tars, data sets of `datasets`.

Files that hold many documents are read as streams (document_readers.py); a text file is one document and is
read whole. What is not read of a directory's files is an `Omission` (omissions.py); where the user named the
file himself, it is refused.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.names import spell_name
from mlpmem_ds.formats.document_readers import READERS, kind_of
from mlpmem_ds.formats.file_marks import LFS_POINTER, NUM_MARK_BYTES, kind_by_mark
from mlpmem_ds.formats.json_readers import holds_records
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules
from mlpmem_ds.formats.saved_datasets import read_dataset_of_name
from mlpmem_ds.formats.streams import is_compressed, is_compressed_name, read_whole, unsupported_format
from mlpmem_ds.formats.text_encoding import MARK, NotTextError

DATASET_PREFIX = "datasets:"
"""an input `datasets:NAME[:CONFIGURATION[:SPLIT]]` is a data set of the Hub, through the package
`datasets`"""
_POINTERS = (LFS_POINTER, b"/annex/objects/")
_TABLES = (b"PAR1", b"ARROW1")  # at both ends
CHAT_KINDS = ("json", "table", "dataset")
"""kinds of files that may hold conversations"""
MAY_NOT_BE_READ = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
"""errors that will come again at the next try"""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file to read: its name is the path below the input that the user named, in POSIX spelling."""

    path: Path
    name: str
    is_named: bool

    def __reduce__(self) -> tuple[Any, ...]:
        # A Path's own way to a process costs as much as a read.
        return source_file, (str(self.path), self.name, self.is_named, self.kind)

    @cached_property
    def kind(self) -> str:
        """`text`, or the key of a reader of many documents."""
        return "dataset" if str(self.path).startswith(DATASET_PREFIX) else kind_of(self.path)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes on the disk, perhaps compressed; 0 of what is no file here, or cannot be asked."""
        if self.kind == "dataset":
            return 0
        try:
            return self.path.stat().st_size
        except OSError:  # said where the file is read
            return 0


def source_file(path: str, name: str, is_named: bool, kind: str) -> SourceFile:
    """A file of a kind that its name does not tell."""
    file = SourceFile(path=Path(path), name=name, is_named=is_named)
    file.__dict__["kind"] = kind
    return file


@dataclass(frozen=True, kw_only=True)
class Document:
    name: str
    group: str
    text: str

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())


def read_documents(file: SourceFile, rules: ReadRules) -> Iterator[Document | Omission]:
    """The documents of one file: the whole file, or one a record, or their pieces or beginnings; and what
    of it is not read.

    Raises:
        UserError: as `_read_whole_documents`.
    """
    for read in _read_whole_documents(file, rules):
        if rules.piece is None or isinstance(read, Omission) or len(read.text) <= rules.piece:
            yield read
            continue
        pieces = cut_text(read.text, rules.piece)
        if rules.first_piece_only:
            yield dataclasses.replace(read, text=next(text for text in pieces if text.strip()))
            yield Omission(name=read.name, reason="shortened")
            continue
        for number, text in enumerate(pieces, start=1):
            if text.strip():
                yield dataclasses.replace(read, name=f"{read.name}, piece {number}", text=text)


def cut_text(text: str, size: int) -> list[str]:
    """Pieces of at most `size` characters, which together are the text; they end where lines end, if one
    does in a piece's second half."""
    pieces, start = [], 0
    while len(text) - start > size:
        line_end = text.rfind("\n", start + size // 2, start + size)
        stop = start + size if line_end < 0 else line_end + 1
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def _read_whole_documents(file: SourceFile, rules: ReadRules) -> Iterator[Document | Omission]:
    """The same before anything is cut.

    Raises:
        UserError: a named file cannot be read whole, or any file of many documents is damaged; names the file
            and the record.
    """
    try:
        if rules.chats and file.kind not in CHAT_KINDS:
            yield _without_chats(file)
        elif file.kind == "text":
            yield _read_text(file, rules)
        else:
            yield from _read_records(file, rules)
    except OSError as error:
        if file.is_named or error.errno not in MAY_NOT_BE_READ:
            raise _unreadable(file, error) from error
        yield Omission(name=file.name, reason="unreadable", detail=str(error.strerror))


def _without_chats(file: SourceFile) -> Omission:
    if file.is_named:
        raise UserError(
            f"{file.path} cannot hold conversations, which are objects of JSON lines, JSON, Parquet, Arrow or"
            " a data set: write them so, or leave out --documents chat"
        )
    return Omission(name=file.name, reason="no conversations", detail=file.path.suffix)


def _unreadable(file: SourceFile, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(
            f"{file.path} is no longer there: the input changed while it was read; run again when it does not"
        )
    remedy = (
        "change its permissions or leave it out"
        if error.errno in MAY_NOT_BE_READ
        else "restore it, or run again when the disk can be read"
    )
    return UserError(f"{file.path} cannot be read ({error.strerror or error}): {remedy}")


def _read_text(file: SourceFile, rules: ReadRules) -> Document | Omission:
    content = file.path.read_bytes()
    if is_compressed(content) or is_compressed_name(file.path.name):
        content = read_whole(file.path)
    if content.startswith(_POINTERS):
        if file.is_named:
            raise UserError(
                f"{file.path} is a pointer of Git LFS or git-annex, not the file itself: fetch it (git lfs"
                " pull, git annex get)"
            )
        return Omission(name=file.name, reason="pointer")
    if content.startswith(_TABLES) and content.endswith(_TABLES):
        return _misnamed(file, ".parquet" if content.startswith(b"PAR1") else ".arrow")
    if content[257:262] == b"ustar" and b"\0" in content[:257]:
        return _misnamed(file, ".tar")
    try:
        text = rules.decode(content)
    except NotTextError as error:
        kind = kind_by_mark(content[:NUM_MARK_BYTES])
        reason = f"{kind}; {error}" if kind else str(error)
        foreign = unsupported_format(content[:NUM_MARK_BYTES])
        if file.is_named and foreign:
            raise UserError(f"{file.path} {foreign}") from error
        if file.is_named:
            raise UserError(
                f"{file.path} is not UTF-8 text ({reason}): name its encoding with --encoding, convert it or"
                " leave it out"
            ) from error
        return Omission(name=file.name, reason="encoding", detail=reason)
    if not text or text.isspace():
        return Omission(name=file.name, reason="empty")
    if holds_records(text, rules):
        return _misnamed(file, ".jsonl")
    group = file.name.split("/")[0].removesuffix(file.path.suffix)
    return Document(name=file.name, group=group, text=text)


def _misnamed(file: SourceFile, suffix: str) -> Omission:
    if file.is_named:
        raise UserError(
            f"{file.path} has the name of a text and holds many documents: rename it to *{suffix}, so that"
            " they are read one by one"
        )
    return Omission(name=file.name, reason="misnamed", detail=suffix)


def _read_records(file: SourceFile, rules: ReadRules) -> Iterator[Document | Omission]:
    reader = read_dataset_of_name if file.kind == "dataset" else READERS[file.kind]
    for record in reader(file.path, rules):
        if isinstance(record, Omission):
            name = f"{file.name}:{spell_name(record.name)}" if record.name else file.name
            yield dataclasses.replace(record, name=name, detail=spell_name(record.detail))
            continue
        name = f"{file.name}:{spell_name(record.key)}"
        text = record.text.lstrip(MARK) if record.text.startswith(MARK) else record.text
        if text and not text.isspace():
            group = file.name if record.group is None else spell_name(record.group)
            yield Document(name=name, group=group, text=text)
        else:
            yield Omission(name=name, reason="empty")
