"""Read files that hold many documents, as streams: JSON lines and webdataset tars; the reader of a name.

Each reader yields records in the file's order and holds one of them, or one batch, in memory. A record
without its text is an error that names the file and the record.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.records import Record, record_of
from mlpmem_ds.formats.table_readers import read_table

_SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "table": (".parquet", ".parq", ".pq", ".arrow", ".arrows", ".feather", ".ipc"),
    "tar": (".tar", ".tar.gz", ".tgz", ".tar.zst"),
}
_ALL_SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
_TEXT_MEMBERS = ("txt", "text", "md")
_DAMAGE = (UnicodeError, EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, tarfile.TarError)


def kind_of(path: Path) -> str:
    """The kind of reader that a file's name calls for; `text` where it is one document."""
    name = path.name
    if not name.endswith(_ALL_SUFFIXES):  # one question to each of a million text files
        return "text"
    return next(kind for kind, suffixes in _SUFFIXES.items() if name.endswith(suffixes))


@contextmanager
def _decompressed(path: Path) -> Iterator[IO[bytes]]:
    with open(path, "rb") as stream:
        if path.name.endswith((".gz", ".tgz")):
            with gzip.open(stream, "rb") as plain:
                yield plain  # type: ignore[misc]
        elif path.name.endswith(".zst"):
            with zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True) as reader:
                yield io.BufferedReader(reader, 1 << 20)
        else:
            yield stream


class _LastBlock:
    """A stream that remembers the last block that was read from it: a whole tar ends with a block of
    zeros."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._tail = b""

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(size)
        self._tail = (self._tail + content)[-tarfile.BLOCKSIZE :]
        return content

    @property
    def is_end_of_archive(self) -> bool:
        return self._tail == bytes(tarfile.BLOCKSIZE)


def read_json_lines(path: Path, text_field: str, group_field: str | None) -> Iterator[Record]:
    """One record a line that is not empty; its key is the line's number from 1."""
    number = 0
    try:
        with _decompressed(path) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line.decode("utf-8"))
                except (json.JSONDecodeError, RecursionError) as error:
                    raise UserError(
                        f"{path} line {number} is not JSON ({error}): mend it or leave the file out"
                    ) from error
                record = record_of(path, f"line {number}", str(number), values, text_field, group_field)
                if record is not None:
                    yield record
    except _DAMAGE as error:
        raise UserError(
            f"{path} is damaged or not UTF-8 near line {number + (not isinstance(error, UnicodeError))}"
            f" ({error}): restore it or leave it out"
        ) from error


def _open_tar(stream: Any) -> tarfile.TarFile:
    return tarfile.open(fileobj=stream, mode="r|")


def read_tar(path: Path, text_field: str, group_field: str | None) -> Iterator[Record]:
    """The samples of a webdataset tar: the members that share a name up to the first dot; the key is that
    name.

    A sample's text is its member `txt`, `text` or `md`, else the text field of its member `json`.
    """
    key = ""
    try:
        with _decompressed(path) as plain, _open_tar(stream := _LastBlock(plain)) as archive:
            sample: dict[str, bytes] = {}
            for member in archive:
                if not member.isfile():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if folder + slash + stem != key:
                    yield from _record_of_sample(path, key, sample, text_field, group_field)
                    key, sample = folder + slash + stem, {}
                content = archive.extractfile(member)
                if extension in (*_TEXT_MEMBERS, "json") and content is not None:
                    sample[extension] = content.read()
            if not stream.is_end_of_archive:  # tarfile says nothing where a file ends between two members
                raise tarfile.ReadError("it has no end-of-archive block")
            yield from _record_of_sample(path, key, sample, text_field, group_field)
    except _DAMAGE as error:
        raise UserError(
            f"{path} is cut short or damaged after sample {key!r} ({error}): restore it or leave it out"
        ) from error


def _record_of_sample(
    path: Path, key: str, sample: Mapping[str, bytes], text_field: str, group_field: str | None
) -> Iterator[Record]:
    place = f"sample {key!r}"
    try:
        plain = next((sample[name].decode("utf-8") for name in _TEXT_MEMBERS if name in sample), None)
        values = json.loads(sample["json"].decode("utf-8")) if "json" in sample else None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{path} {place} is not UTF-8 text or JSON ({error}): mend it or leave the file out"
        ) from error
    if plain is None and values is None:
        return
    if plain is not None:
        values = {**(values if isinstance(values, dict) else {}), text_field: plain}
    record = record_of(path, place, key, values, text_field, group_field)
    if record is not None:
        yield record


READERS: dict[str, Callable[[Path, str, str | None], Iterator[Record]]] = {
    "jsonl": read_json_lines,
    "table": read_table,
    "tar": read_tar,
}
