"""One file that a command writes, a table or a page: refused before the work where it cannot be written, or
would replace what is read or what a stage has made."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.manifest import MARKS_OF_OURS, is_own_directory

_PAGES = (".html", ".prom")  # of which no stage has one among its files


def check_output_file(
    path: Path, *, example: str, flag: str = "--output", inputs: Iterable[Path] = ()
) -> None:
    """Refuse a file that cannot be written, or that is another's.

    Args:
        path: of the file; one that exists is replaced.
        example: a name for it, for messages.
        flag: that named it.
        inputs: files that the command reads.

    Raises:
        UserError: it is a directory, a device, in no folder that can be written, an input, or a file of a
            stage's directory.
    """
    named, folder = f"{flag} {path}", path.absolute().parent
    if path.is_dir():
        raise UserError(f"{named} is a directory: name a file, such as {path / example}")
    if not folder.is_dir():
        raise UserError(f"{named}: {folder} does not exist; make it first, or choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{named}: {folder} cannot be written to; choose another, or change its permissions")
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{named} is a device or a pipe: name a file, such as {example}")
    if any(other.exists() and path.samefile(other) for other in inputs):
        raise UserError(
            f"{named} is also what is read, and would be replaced: name another, such as {example}"
        )
    owner = None if path.suffix.lower() in _PAGES else owner_of(path.parent)
    if owner is not None:
        raise UserError(
            f"{named} is a file of {owner}, which a command of this project has made, and would be replaced:"
            f" name one outside of it, such as {example}"
        )


def owner_of(folder: Path) -> Path | None:
    """The directory of a stage, an export or a checkpoint that a folder is, or lies in; None: none."""
    folder = folder.resolve()
    return next(
        (
            each
            for each in (folder, *folder.parents)
            if any((each / name).is_file() and is_own_directory(each, name) for name in MARKS_OF_OURS)
        ),
        None,
    )
