"""Read files that hold many documents, as streams: JSON lines, Parquet, webdataset tars, saved and named data
sets.

Each reader yields records in the file's order and holds one of them, or one batch, in memory. A record
without its text is an error that names the file and the record.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from mlpmem_ds.core.errors import UserError

_SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
    "tar": (".tar", ".tar.gz", ".tgz", ".tar.zst"),
    "arrow": (".arrow",),
}
_ALL_SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
_ROWS = 256  # of a Parquet or Arrow batch
_TEXT_MEMBERS = ("txt", "text", "md")
_DAMAGE = (UnicodeError, EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, tarfile.TarError)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One document as a file holds it: `key` names it within the file; `group` is None where the file does
    not say."""

    key: str
    text: str
    group: str | None


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


def _record(
    path: Path, place: str, key: str, values: Any, text_field: str, group_field: str | None
) -> Record | None:
    """The record of an object with the requested fields; None where its text is null."""
    requested = [text_field, *([group_field] if group_field else [])]
    if not isinstance(values, Mapping) or any(name not in values for name in requested):
        found = (
            f"it has {', '.join(map(str, values)) or 'none'}"
            if isinstance(values, Mapping)
            else "it is no object"
        )
        raise UserError(
            f"{path} {place} is not an object with the fields {', '.join(requested)} ({found}): name them"
            " with --text-field and --group-field"
        )
    text = values[text_field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(
            f"{path} {place}: its {text_field} is {type(text).__name__}, not text: choose another"
            " --text-field"
        )
    try:
        text.encode()  # a lone surrogate is no text
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path} {place}: its {text_field} cannot be written as UTF-8 ({error}): mend that record"
        ) from error
    return Record(key=key, text=text, group=str(values[group_field]) if group_field else None)


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
                record = _record(path, f"line {number}", str(number), values, text_field, group_field)
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
    record = _record(path, place, key, values, text_field, group_field)
    if record is not None:
        yield record


def import_arrow(name: str, *, path: Path) -> Any:
    """A module of pyarrow.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(f"pyarrow.{name}")
    except ImportError as error:
        raise UserError(
            f"{path} needs pyarrow, which is not installed: pip install 'mlpmem-ds[arrow]'"
        ) from error


def read_parquet(path: Path, text_field: str, group_field: str | None) -> Iterator[Record]:
    """One record a row; its key is the row's number from 0. Only the requested columns are read."""
    parquet = import_arrow("parquet", path=path)
    with _arrow_errors(path):
        file = parquet.ParquetFile(path)
        columns = _columns(path, file.schema_arrow.names, text_field, group_field)
        yield from _rows(path, file.iter_batches(batch_size=_ROWS, columns=columns), text_field, group_field)


def read_arrow(path: Path, text_field: str, group_field: str | None) -> Iterator[Record]:
    """One record a row of an Arrow stream, as `datasets` saves it; its key is the row's number from 0."""
    ipc = import_arrow("ipc", path=path)
    with _arrow_errors(path), open(path, "rb") as stream:
        batches = ipc.open_stream(stream)
        columns = _columns(path, batches.schema.names, text_field, group_field)
        yield from _rows(path, (batch.select(columns) for batch in batches), text_field, group_field)


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these families
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} is cut short or damaged ({error}): restore it or leave it out") from error


def _columns(path: Path, names: list[str], text_field: str, group_field: str | None) -> list[str]:
    requested = [text_field, *([group_field] if group_field else [])]
    if missing := [name for name in requested if name not in names]:
        raise UserError(
            f"{path} has no column {missing[0]!r} (it has {', '.join(names)}): name it with --text-field or"
            " --group-field"
        )
    return list(dict.fromkeys(requested))


def _rows(path: Path, batches: Any, text_field: str, group_field: str | None) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            record = _record(path, f"row {number}", str(number), values, text_field, group_field)
            if record is not None:
                yield record
            number += 1


def is_saved_dataset(root: Path) -> bool:
    """Whether `datasets` saved this directory (`save_to_disk`): one data set, or one a split."""
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def datasets_files(root: Path) -> list[Path]:
    """The Arrow files of a saved data set, in its order.

    Raises:
        UserError: its lists of files cannot be read, or a file is missing.
    """
    try:
        if (root / "dataset_dict.json").is_file():
            splits = json.loads((root / "dataset_dict.json").read_bytes())["splits"]
            return [file for split in splits for file in datasets_files(root / Path(split).name)]
        names = [entry["filename"] for entry in json.loads((root / "state.json").read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--input {root} is a saved data set whose list of files cannot be read ({error!r})"
        ) from error
    files = [root / Path(name).name for name in names]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(
            f"--input {root} is a saved data set without its file {missing[0].name}: save or copy it again"
        )
    return files


def read_dataset_of_name(path: Path, text_field: str, group_field: str | None) -> Iterator[Record]:
    """`datasets:NAME[:CONFIGURATION[:SPLIT]]`, streamed by the package `datasets`; the split is `train` by
    default."""
    _, name, *rest = str(path).split(":")
    configuration, split = (rest[0] or None) if rest else None, rest[1] if len(rest) > 1 else "train"
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"{path} needs the package datasets, which is not installed: pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(name, configuration, split=split, streaming=True)
    except Exception as error:  # a family of errors for each way to fail
        raise UserError(
            f"{path} cannot be loaded ({error}): check the name, the configuration and the network"
        ) from error
    for number, values in enumerate(rows):
        record = _record(path, f"row {number}", str(number), values, text_field, group_field)
        if record is not None:
            yield record


READERS: dict[str, Callable[[Path, str, str | None], Iterator[Record]]] = {
    "jsonl": read_json_lines,
    "parquet": read_parquet,
    "tar": read_tar,
    "arrow": read_arrow,
}
