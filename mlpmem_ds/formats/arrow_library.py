"""pyarrow, which is optional: its import, its errors in our words, and the batches of its own formats."""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mlpmem_ds.core.errors import UserError, in_one_line
from mlpmem_ds.formats.file_marks import NUM_MARK_BYTES, kind_by_mark

_FILE, _STREAM = b"ARROW1", b"\xff\xff\xff\xff"


def import_arrow(name: str, *, path: Path) -> Any:
    """A module of pyarrow.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(f"pyarrow.{name}")
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow, which is not installed: pip install 'pyarrow>=25'") from error


@contextmanager
def arrow_errors(path: Path) -> Iterator[None]:
    """Errors of pyarrow that are raised inside, as UserErrors that say which kind of fault it is.

    Errors of the operating system (with a number) and UserErrors go through as they are.
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(
            f"{path} needs more memory than there is ({in_one_line(error)}): write it again with smaller row"
            " groups or batches"
        ) from error
    except NotImplementedError as error:
        raise UserError(
            f"{path} holds what this version of pyarrow cannot read ({in_one_line(error)}): install a newer"
            " pyarrow, or write the file again with plain columns and compression"
        ) from error
    except (OSError, ValueError, LookupError, TypeError) as error:  # pyarrow's own errors are of these kinds
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if "crypt" in str(error):
            raise UserError(
                f"{path} is encrypted ({in_one_line(error)}): write it again without encryption"
            ) from error
        raise UserError(
            f"{path} is cut short or damaged ({in_one_line(error)}): restore it or leave it out"
        ) from error


def arrow_batches(path: Path, stream: IO[bytes], check: Callable[[Any], object]) -> Iterator[Any]:
    """The record batches of an Arrow file (Feather), of an Arrow stream, or of streams one after the other.

    They are mapped from the disk, so that a batch of any size costs no memory. A stream must end with its
    mark, without which one that was cut between two batches looks whole.

    Args:
        path: for messages.
        stream: the file, open at its start.
        check: is called with each schema before its batches.

    Raises:
        UserError: the file is something else; inside `arrow_errors`, also for damage.
    """
    first = stream.read(NUM_MARK_BYTES)
    is_file = first.startswith(_FILE)
    if not is_file and (kind := kind_by_mark(first)):
        raise UserError(f"{path} is no table, but {kind}: give the table, or leave the file out")
    # A stream begins with its own mark; before Arrow 0.15, with the length of its schema.
    if not is_file and not first.startswith(_STREAM) and first[2:4] != b"\0\0":
        raise UserError(
            f"{path} is neither Parquet nor Arrow: it begins with {first[:8]!r}: restore it or leave it out"
        )
    ipc, arrow = import_arrow("ipc", path=path), import_arrow("lib", path=path)
    source = arrow.BufferReader(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    if is_file:
        file = ipc.open_file(source)
        check(file.schema)
        for number in range(file.num_record_batches):
            yield file.get_batch(number)
        return
    while source.tell() < source.size():
        reader = ipc.open_stream(source)
        check(reader.schema)
        while True:
            end = source.tell()
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                break
            yield batch
        if source.tell() == end:
            raise ValueError("it has no end-of-stream mark")
