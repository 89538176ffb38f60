"""The files of one unit of a stage, published whole, and their records."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlpmem_ds.core.array_files import ArrayWriter, array_file
from mlpmem_ds.core.files import FileRecord, flush, publish, publish_array, record_file


class UnitWriter:
    """Publishes the files of one unit and remembers their records.

    Their folders are flushed once, at the end: each flush is a request to the server of a network file
    system's names, which all ranks share.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.records: list[FileRecord] = []
        self._folders: set[Path] = set()

    def _path_of(self, name: str) -> Path:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._folders.add(path.parent)
        return path

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A temporary path that becomes OUTPUT/name when the block ends."""
        with publish(self._path_of(name), flush_folder=False) as temporary:
            yield temporary
        self.records.append(record_file(self._root, name))

    def copy_folder(
        self, folder: Path, name: str = "", *, put: Callable[[Path, Path], object] = shutil.copyfile
    ) -> None:
        """Publish each file below `folder` under its path in there, below OUTPUT/name.

        Args:
            folder: a library has written it, perhaps with folders in it.
            name: of the folder that they get; empty: the output itself.
            put: brings a file from one path to another, such as `os.replace` where `folder` goes anyway.
        """
        for source in sorted(path for path in folder.rglob("*") if path.is_file()):
            with self.file((Path(name) / source.relative_to(folder)).as_posix()) as path:
                put(source, path)

    def array(self, name: str, array: np.ndarray) -> None:
        record = publish_array(self._path_of(name), array, flush_folder=False)
        self.records.append(replace(record, name=name))

    @contextlib.contextmanager
    def array_file(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[ArrayWriter]:
        """OUTPUT/name, an array that is written a few rows at a time; it appears when the block ends."""
        with array_file(self._path_of(name), shape, dtype, flush_folder=False) as rows:
            yield rows
        self.records.append(rows.record(name))

    def flush_folders(self) -> None:
        """Make the files' names survive a crash of the machine; before the record is written."""
        for folder in self._folders:
            flush(folder)
