"""The content of a file as a stream, decompressed: gzip, zstd, bzip2, xz, told by the first bytes.

A name may be wrong: plain text under a name in `.gz` is read as it is, and gzip under a plain name is
decompressed. Members (gzip), frames (zstd) and streams (bzip2, xz) that were joined are read one after
another, and each must be whole. All have a checksum, except zstd frames of a writer that left it out: there a
changed byte may go unnoticed. A file that is cut exactly between two members ends like a whole one.
"""

from __future__ import annotations

import bz2
import codecs
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from mlpmem_ds.core.errors import UserError

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
COMPRESSED_TAR_SUFFIXES = (".tgz", ".tzst", ".tbz2", ".txz")
_READ = 1 << 13  # compressed bytes at once: of a run of one byte each makes 32,000 bytes of text
_BUFFER = 1 << 20
_WINDOW = 1 << 31  # bytes: the longest of zstd's (--long=31); only a file that has it takes the memory
_SNIFFED = 512


class DamagedStreamError(ValueError):
    """Compressed data that are cut short or altered; the message is the reason, without the file."""


@dataclass(frozen=True, kw_only=True)
class _Format:
    name: str
    magic: re.Pattern[bytes]
    decompressor: Callable[[], Any]
    """an object with `decompress`, `eof` and `unused_data`"""
    has_padding: bool
    """whether zeros may follow the last member"""


_FORMATS = (
    _Format(
        name="gzip",
        magic=re.compile(rb"\x1f\x8b"),
        decompressor=lambda: zlib.decompressobj(wbits=31),  # with header, checksum and length
        has_padding=True,
    ),
    _Format(
        name="zstd",
        magic=re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or one to skip
        decompressor=lambda: zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj(),
        has_padding=False,
    ),
    _Format(
        name="bzip2",
        magic=re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
        decompressor=bz2.BZ2Decompressor,
        has_padding=False,
    ),
    _Format(
        name="xz",
        magic=re.compile(rb"\xfd7zXZ\x00"),
        decompressor=lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ),
        has_padding=True,
    ),
)
_LONGEST_MAGIC = 10
_STARTS = (
    *(b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\x00"),
    *(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60)),
)
_ERRORS = (zlib.error, zstandard.ZstdError, lzma.LZMAError, EOFError, OSError)  # OSError is bz2's
# Other formats that people have: first bytes → name and a command that unpacks it.
_FOREIGN = {
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -d"),
    b"\x02\x21\x4c\x18": ("lz4", "lz4 -d"),
    b"PK\x03\x04": ("zip", "unzip"),
    b"PK\x05\x06": ("zip", "unzip"),
    b"7z\xbc\xaf\x27\x1c": ("7z", "7z x"),
    b"Rar!\x1a\x07": ("rar", "unrar x"),
    b"\x1f\x9d": ("compress (.Z)", "uncompress"),
    b"\x89LZO\x00": ("lzop", "lzop -d"),
    b"LZIP": ("lzip", "lzip -d"),
}


_ANY_MAGIC = re.compile(b"|".join(each.magic.pattern for each in _FORMATS))


def is_compressed_name(name: str) -> bool:
    """Whether a file's name says that it is compressed; .tgz and its like count."""
    return name.lower().endswith((*COMPRESSED_SUFFIXES, *COMPRESSED_TAR_SUFFIXES))


def is_compressed(head: bytes) -> bool:
    """Whether a file that begins with these bytes is compressed."""
    return _ANY_MAGIC.match(head) is not None


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The file's content, decompressed if it is compressed.

    Raises:
        UserError: it is cut short, damaged, or of a format that we do not read; also while the stream is
            read. Names the file, the place in it and the remedy.
    """
    with open(path, "rb") as file:
        head = file.peek(_SNIFFED)[:_SNIFFED]
        found = next((each for each in _FORMATS if each.magic.match(head)), None)
        if found is None:
            _check_plain(path, head)
            yield file
            return
        try:
            stream: Any = io.BufferedReader(_Members(file, found), _BUFFER)
            if any(each.magic.match(stream.peek(_LONGEST_MAGIC)) for each in _FORMATS):
                raise UserError(f"{path} is compressed twice: decompress it once first")
            yield stream
        except DamagedStreamError as error:
            size = path.stat().st_size
            raise UserError(
                f"{path} cannot be read whole near byte {min(file.tell(), size):,} of {size:,} as"
                f" {found.name} ({error})"
            ) from error


def read_whole(path: Path) -> bytes:
    """All of a file's content, decompressed. See `opened`."""
    with opened(path) as stream:
        return stream.read()


def unsupported_format(head: bytes) -> str | None:
    """What the first bytes say of a file that no reader takes: its format and how to unpack it."""
    found = next((_FOREIGN[magic] for magic in _FOREIGN if head.startswith(magic)), None)
    return found and f"is {found[0]}, which is not read: unpack it first ({found[1]})"


def _check_plain(path: Path, head: bytes) -> None:
    if reason := unsupported_format(head):
        raise UserError(f"{path} {reason}")
    if not is_compressed_name(path.name):
        return
    if any(start.startswith(head) or head.startswith(start) for start in _STARTS):
        raise UserError(f"{path} is cut short in its header: restore the file or leave it out")
    if head[257:262] != b"ustar" and not _begins_as_text(head):
        formats = ", ".join(each.name for each in _FORMATS)
        raise UserError(
            f"{path} is neither compressed as its name says nor plain text: it begins with {head[:4]!r},"
            f" which none of {formats} does: restore it or leave it out"
        )


def _begins_as_text(head: bytes) -> bool:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        return True
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return True


class _Members(io.RawIOBase):
    """The content of compressed members that stand one after another in a file."""

    def __init__(self, file: BinaryIO, compression: _Format) -> None:
        super().__init__()
        self._file, self._format = file, compression
        self._member: Any = None
        self._rest = b""  # read from the file, not yet decompressed
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """As any raw stream; but whoever looks at the first bytes (`peek`) has enough of them."""
        filled = 0
        while filled < min(len(buffer), _SNIFFED):  # a member may hold a byte or none
            if self._content:
                size = min(len(buffer) - filled, len(self._content))
                buffer[filled : filled + size] = self._content[:size]
                self._content = self._content[size:]
                filled += size
            elif self._member is None and not self._begin_member():
                break
            else:
                self._content = memoryview(self._next_content())
        return filled

    def _begin_member(self) -> bool:
        """Start to decompress the next member; False at the end of the file."""
        self._skip_padding()
        while len(self._rest) < _LONGEST_MAGIC and (more := self._file.read(_READ)):
            self._rest += more
            self._skip_padding()
        if not self._rest:
            return False
        if not self._format.magic.match(self._rest):
            raise DamagedStreamError(
                f"what follows the end of a whole part is no {self._format.name} data: it begins with"
                f" {self._rest[:4]!r}: cut that off, or restore the file"
            )
        self._member = self._format.decompressor()
        return True

    def _skip_padding(self) -> None:
        if self._format.has_padding:
            self._rest = self._rest.lstrip(b"\0")

    def _next_content(self) -> bytes:
        compressed = self._rest or self._file.read(_READ)
        self._rest = b""
        if not compressed:
            raise DamagedStreamError(
                "it is cut short: its data end before their end mark: restore the file or leave it out"
            )
        try:
            content: bytes = self._member.decompress(compressed)
        except _ERRORS as error:
            raise DamagedStreamError(_reason(error)) from error
        if self._member.eof:
            self._rest, self._member = self._member.unused_data, None
        return content


def _reason(error: Exception) -> str:
    text = str(error).removeprefix("zstd decompressor error: ")
    if "ictionary" in text:
        return f"{text}: it was compressed with a dictionary: decompress it first (zstd -d -D DICTIONARY)"
    if "memory" in text:
        return f"{text}: its window needs more than this machine has, or than 2 GB; or its header is damaged"
    return f"it is damaged: {text}: restore the file or leave it out"
