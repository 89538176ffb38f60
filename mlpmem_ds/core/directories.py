"""Directories that appear whole or not at all: filled under a temporary name, flushed, renamed.

One that takes the place of another is renamed in two steps, and a kill between them leaves `.<name>.former`
alone: whoever is about to read or replace the directory calls `put_back_former` first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from mlpmem_ds.core.files import flush
from mlpmem_ds.core.host import host_name
from mlpmem_ds.core.temporaries import remove_stale_directories, remove_stale_temporaries


@contextlib.contextmanager
def publish_directory(path: Path, *, temporary: Path) -> Iterator[Path]:
    """Give an empty directory to fill; at the end it becomes `path`, after an error it is removed.

    Args:
        path: the name that it gets; what has it then is replaced.
        temporary: the name until then, on the same file system; what a killed run left there is removed.
    """
    put_back_former(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_directory(path, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_directory(path: Path, filled: Path) -> None:
    """Flush all that is in a filled directory and rename it to `path`.

    A directory that has that name is renamed first, to `.<name>.former`, and removed at the end; where the
    other cannot be renamed, it gets its name back.
    """
    put_back_former(path)
    for folder, _, names in os.walk(filled, topdown=False):
        for name in names:
            flush(Path(folder, name))
        flush(Path(folder))
    if path.exists():
        os.replace(path, _former(path))
    try:
        os.replace(filled, path)
        flush(path.parent)
    finally:
        put_back_former(path)


def put_back_former(path: Path) -> None:
    """After a replacement that was cut off, or at its end: the directory that `path` named before gets its
    name back where nothing has it, and is removed where its successor has."""
    former = _former(path)
    if not former.exists():
        return
    if path.exists():
        shutil.rmtree(former, ignore_errors=True)
    else:
        os.replace(former, path)
        flush(path.parent)


def _former(path: Path) -> Path:
    return path.with_name(f".{path.name}.former")


@contextlib.contextmanager
def work_directory(path: Path, *, continues: Callable[[Path], bool]) -> Iterator[Path]:
    """Give this process a directory next to `path`, `.<name>.<host>.<pid>.partial`; it is removed at the end.

    What killed processes of this host left under such names is removed first, and what other hosts left and
    have not written to for an hour; but for one of this host that `continues` accepts as the same work: it is
    taken over, without its half-written files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".partial"
    own = path.parent / f".{path.name}.{host_name()}.{os.getpid()}{suffix}"
    for other in remove_stale_directories(path.parent, name=path.name, suffix=suffix):
        if other != own and not own.exists() and continues(other):
            os.replace(other, own)
        else:
            shutil.rmtree(other)
    own.mkdir(exist_ok=True)
    remove_stale_temporaries(own)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
