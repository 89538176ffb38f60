"""What a file is by its name or its first bytes, for messages about files that are not read."""

from __future__ import annotations

import mimetypes
import os
import re
from functools import cache

NUM_MARK_BYTES = 64
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
TABLE_SUFFIXES = (".parquet", ".parq", ".pq", ".arrow", ".arrows", ".feather", ".ipc")
RESOURCE_FORK = b"\x00\x05\x16\x07"
"""AppleDouble: what macOS keeps next to a file, named `._` and the file's name, on disks of others"""
LFS_POINTER = b"version https://git-lfs"
"""how a file begins that stands for another one, which Git LFS has not fetched"""
_TYPES = mimetypes.MimeTypes(filenames=())  # Python's own list, not this machine's
_NO_TEXT = re.compile(r"(image/(?!svg)|audio/|video/|font/|application/(octet-stream|x-python-code|wasm)$)")
_SYSTEM_FILES = {".DS_Store", "Thumbs.db", "desktop.ini", "Desktop.ini", ".localized", "Icon\r"}

_OF_TABLES = ("_SUCCESS", "_metadata", "_common_metadata")
"""what Hadoop and Spark write next to the parts of a table; and checksums, `.NAME.crc`"""

_MARKS: tuple[tuple[bytes, str], ...] = (
    (b"PAR1", "a Parquet file"),
    (b"PARE", "an encrypted Parquet file"),
    (b"ARROW1", "a file in Arrow's file format"),
    (b"FEA1", "a Feather file of version 1 (write it again: pyarrow.feather.write_feather)"),
    (LFS_POINTER, "a pointer of Git LFS, not the file itself (fetch it: git lfs pull)"),
    (b"\x1f\x8b", "compressed by gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard"),
    (b"\x04\x22\x4d\x18", "compressed by LZ4"),
    (b"BZh", "compressed by bzip2"),
    (b"\xfd7zXZ\0", "compressed by xz"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"ORC", "an ORC file"),
    (b"Obj\x01", "an Avro file"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"%PDF-", "a PDF document"),
    (b"\xef\xbb\xbf", "text"),
    (b"{", "JSON"),
    (b"[", "JSON"),
)  # fmt: skip


def kind_by_mark(first: bytes) -> str:
    """What a file that begins with these bytes is, in words; empty where they say nothing."""
    if not first:
        return "empty"
    for mark, kind in _MARKS:
        if first.startswith(mark):
            return kind
    if first.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page or XML (the page of an error, where a download failed?)"
    return ""


def is_system_file(name: str) -> bool:
    """Whether a name (without its folder) is that of a file which the operating system keeps in folders."""
    return name in _SYSTEM_FILES


def is_no_text_by_name(name: str) -> bool:
    """Whether a name (without its folder) says that a file is no text, such as a picture."""
    if name in _OF_TABLES or (name.startswith(".") and name.endswith(".crc")):
        return True
    return _is_no_text_suffix(os.path.splitext(name)[1].lower())


@cache
def _is_no_text_suffix(suffix: str) -> bool:
    """Kept, because a million pictures have few suffixes."""
    kind, packing = _TYPES.guess_type(f"name{suffix}", strict=False)
    return bool(kind and not packing and _NO_TEXT.match(kind))
