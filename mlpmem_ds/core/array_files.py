"""Arrays in .npy files: read, and written a few rows at a time where one need not be in memory whole.

What is written so has the bytes of `files.publish_array`. The checksum is made, and the disk is asked to keep
what it has, while the rows arrive, so that little is left to do at the end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import FileRecord, HashedStream, publish

_BYTES_BETWEEN_FLUSHES = 1 << 26


def read_array(path: Path, *, mapped: bool = False) -> np.ndarray:
    """The array of a file; `mapped`: its numbers stay on disk until they are used.

    Raises:
        DamagedDataError: it is no array of numbers. Objects are never unpickled.
    """
    try:
        if mapped:
            return np.lib.format.open_memmap(path, mode="r")
        with open(path, "rb") as stream:
            array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DamagedDataError(
            f"{path} is no array of numbers ({error}): run the stage that wrote it again, or restore it from"
            " a copy"
        ) from error
    return array


class ArrayWriter:
    """The rows of one file, in order."""

    def __init__(self, stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype, self.num_rows = shape, np.dtype(dtype), 0
        self._stream, self._hashed, self._unflushed = stream, HashedStream(stream), 0
        np.lib.format.write_array_header_1_0(
            self._hashed,
            {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape},
        )

    def append(self, rows: np.ndarray) -> None:
        """The next rows, of the file's dtype."""
        assert rows.dtype == self.dtype and rows.shape[1:] == self.shape[1:], (rows.dtype, rows.shape)
        self._hashed.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
        self.num_rows += len(rows)
        self._unflushed += rows.nbytes
        if self._unflushed >= _BYTES_BETWEEN_FLUSHES:
            self._unflushed = 0
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def record(self, name: str) -> FileRecord:
        """The file's, when all rows are written."""
        return self._hashed.record(name)


@contextlib.contextmanager
def array_file(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, *, flush_folder: bool = True
) -> Iterator[ArrayWriter]:
    """While open, rows can be appended; on leaving, the file appears whole; on an error, not at all.
    `flush_folder` as in `files.publish`."""
    with publish(path, flush_folder=flush_folder) as temporary, open(temporary, "wb") as stream:
        rows = ArrayWriter(stream, shape, dtype)
        yield rows
        assert rows.num_rows == shape[0], f"{path}: {rows.num_rows} of {shape[0]} rows were written"
