"""Documents from files: text, Markdown, source code, and JSON lines (.jsonl, .jsonl.gz, .jsonl.zst); in a fixed order.

A directory is walked in sorted order; what is not UTF-8 text is left out there, but refused where the user named the
file himself.
"""

from __future__ import annotations

import fnmatch
import glob
import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard

from mlpmem_ds.core.errors import UserError

TEXT_PATTERNS = (
    "*.txt",
    "*.md",
    "*.rst",
    "*.py",
    "*.pyi",
    "*.c",
    "*.h",
    "*.cc",
    "*.cpp",
    "*.hpp",
    "*.rs",
    "*.go",
    "*.java",
    "*.js",
    "*.ts",
    "*.rb",
    "*.sh",
    "*.html",
    "*.css",
    "*.tex",
    "*.jsonl",
    "*.jsonl.gz",
    "*.jsonl.zst",
)
_JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file to read: its name is the path below the input that the user named, in POSIX spelling."""

    path: Path
    name: str
    is_named: bool

    @property
    def is_jsonl(self) -> bool:
        return self.path.name.endswith(_JSONL_SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class Document:
    name: str
    group: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def find_files(inputs: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> list[SourceFile]:
    """The files below `inputs` (files, directories, globs), sorted by name within each input.

    Args:
        include: patterns that a file's name in a directory must match one of.
        exclude: patterns; a file is left out if its path below the input, or any directory in it, matches one.

    Raises:
        UserError: an input does not exist, or nothing is left.
    """
    files: list[SourceFile] = []
    for given in inputs:
        paths = (
            [Path(given)]
            if Path(given).exists()
            else [Path(match) for match in sorted(glob.glob(given, recursive=True))]
        )
        if not paths:
            raise UserError(f"--input {given} does not exist and matches nothing: check the path")
        for path in paths:
            if path.is_dir():
                files += _walk(path, include, exclude)
            else:
                files.append(SourceFile(path=path, name=path.name, is_named=True))
    if not files:
        raise UserError(
            f"no text files below {', '.join(inputs)}: --include says which names count "
            f"({' '.join(include)}), --exclude which do not ({' '.join(exclude) or 'none'})"
        )
    return files


def _walk(root: Path, include: Sequence[str], exclude: Sequence[str]) -> list[SourceFile]:
    found = []
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        parts = [relative.as_posix(), *relative.parts]
        if any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in exclude) or not path.is_file():
            continue
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in include):
            found.append(SourceFile(path=path, name=relative.as_posix(), is_named=False))
    return found


def read_documents(file: SourceFile, *, text_field: str, group_field: str | None) -> Iterator[Document]:
    """The documents of one file: the whole file, or one a JSON line; empty ones are left out.

    Raises:
        UserError: a named file is not UTF-8 text, or a line is not a JSON object with the text field.
    """
    if file.is_jsonl:
        yield from _read_json_lines(file, text_field, group_field)
        return
    try:
        text = file.path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        if file.is_named:
            raise UserError(f"{file.path} is not UTF-8 text ({error}): convert it or leave it out") from error
        return
    if text.strip():
        yield Document(name=file.name, group=file.name.split("/")[0].removesuffix(file.path.suffix), text=text)


def _read_json_lines(file: SourceFile, text_field: str, group_field: str | None) -> Iterator[Document]:
    try:
        yield from _parse_lines(file, text_field, group_field)
    except (UnicodeError, EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{file.path} is damaged or not UTF-8 ({error}): restore it or leave it out") from error


def _parse_lines(file: SourceFile, text_field: str, group_field: str | None) -> Iterator[Document]:
    with _open_lines(file.path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                text = record[text_field]
                group = str(record[group_field]) if group_field else file.name
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{file.path} line {number} is not a JSON object with the wanted fields ({error!r}): "
                    "name them with --text-field and --group-field"
                ) from error
            if isinstance(text, str) and text.strip():
                text.encode()  # a lone surrogate is no text
                yield Document(name=f"{file.name}:{number}", group=group, text=text)


def _open_lines(path: Path) -> io.TextIOBase:
    """The lines of a JSON-lines file; closing them closes the file."""
    if path.name.endswith(".gz"):
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8")
    stream = open(path, "rb")  # noqa: SIM115 (the wrapper that is returned owns it)
    if path.name.endswith(".zst"):
        reader = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True, closefd=True)
        return io.TextIOWrapper(reader, encoding="utf-8")
    return io.TextIOWrapper(stream, encoding="utf-8")
