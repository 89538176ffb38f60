"""Documents from files, in a fixed order: text and source code, JSON lines, Parquet, webdataset tars, saved
datasets.

A directory is walked in sorted order; what is not UTF-8 text is left out there, but refused where the user
named the file himself. A directory that `datasets` saved is read as one. Files that hold many documents are
read as streams (document_readers.py); a text file is one document and is read whole.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.document_readers import READERS, kind_of
from mlpmem_ds.formats.saved_datasets import datasets_files, is_saved_dataset, read_dataset_of_name

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
CONTAINER_PATTERNS = ("*.parquet", "*.tar", "*.tar.gz", "*.tgz", "*.tar.zst")
FILE_PATTERNS = TEXT_PATTERNS + CONTAINER_PATTERNS
"""names that count in a directory, unless the user said which do"""
DATASET_PREFIX = "datasets:"
"""an input `datasets:NAME[:CONFIGURATION[:SPLIT]]` is a data set of the Hub, through the package
`datasets`"""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file to read: its name is the path below the input that the user named, in POSIX spelling."""

    path: Path
    name: str
    is_named: bool

    def __reduce__(self) -> tuple[Any, ...]:
        # A Path's own way to a process costs as much as a read.
        return _source_file, (str(self.path), self.name, self.is_named)

    @cached_property
    def kind(self) -> str:
        """`text`, or the key of a reader of many documents."""
        return "dataset" if str(self.path).startswith(DATASET_PREFIX) else kind_of(self.path)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes on the disk, perhaps compressed; 0 of what is no file here."""
        return 0 if self.kind == "dataset" else self.path.stat().st_size


def _source_file(path: str, name: str, is_named: bool) -> SourceFile:
    return SourceFile(path=Path(path), name=name, is_named=is_named)


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


def find_files(
    inputs: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str]
) -> list[SourceFile]:
    """The files below `inputs` (files, directories, globs, saved or named data sets), sorted by name within
    each input.

    Args:
        include: patterns that a file's name in a directory must match one of; None = FILE_PATTERNS.
        exclude: patterns; a file is left out if its path below the input, or any directory in it, matches
            one.

    Raises:
        UserError: an input does not exist, or nothing is left.
    """
    include = FILE_PATTERNS if include is None else include
    files: list[SourceFile] = []
    for given in inputs:
        if given.startswith(DATASET_PREFIX):
            files.append(SourceFile(path=Path(given), name=given, is_named=True))
            continue
        paths = (
            [Path(given)]
            if Path(given).exists()
            else [Path(match) for match in sorted(glob.glob(given, recursive=True))]
        )
        if not paths:
            raise UserError(
                f"--input {given} does not exist and matches nothing: check the path (a data set of the Hub"
                f" is {DATASET_PREFIX}NAME)"
            )
        for path in paths:
            if path.is_dir() and is_saved_dataset(path):
                names = [(file, file.relative_to(path).as_posix()) for file in datasets_files(path)]
                files += [SourceFile(path=file, name=name, is_named=True) for file, name in names]
            elif path.is_dir():
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
    is_included, is_excluded = _matcher(include), _matcher(exclude)
    return [
        SourceFile(path=root / name, name=name, is_named=False)
        for name in _names_below(str(root), "", is_excluded)
        if is_included(name.rpartition("/")[2]) and not is_excluded(name)
    ]


def _names_below(folder: str, prefix: str, is_excluded: Callable[[str], bool]) -> Iterator[str]:
    """The files below a folder, folders in the place of their names; linked folders are not entered."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # a folder that may not be read
        return
    for entry in entries:
        if is_excluded(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _names_below(entry.path, f"{prefix}{entry.name}/", is_excluded)
        elif entry.is_file():
            yield prefix + entry.name


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a name matches one of them."""
    if not patterns:
        return lambda name: False
    match = re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns)).match
    return lambda name: match(name) is not None


def read_documents(file: SourceFile, *, text_field: str, group_field: str | None) -> Iterator[Document]:
    """The documents of one file: the whole file, or one a record; empty ones are left out.

    Raises:
        UserError: a named file is not UTF-8 text, or a record of it has no text; names the file and the
            record.
    """
    if file.kind == "text":
        yield from _read_text(file)
        return
    reader = read_dataset_of_name if file.kind == "dataset" else READERS[file.kind]
    for record in reader(file.path, text_field, group_field):
        if record.text and not record.text.isspace():
            name = f"{file.name}:{record.key}"
            yield Document(
                name=name, group=file.name if record.group is None else record.group, text=record.text
            )


def _read_text(file: SourceFile) -> Iterator[Document]:
    content = file.path.read_bytes()
    if b"\r" in content:  # line ends as Python reads a text file
        content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        if file.is_named:
            raise UserError(f"{file.path} is not UTF-8 text ({error}): convert it or leave it out") from error
        return
    if text and not text.isspace():
        yield Document(
            name=file.name, group=file.name.split("/")[0].removesuffix(file.path.suffix), text=text
        )
