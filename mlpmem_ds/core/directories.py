"""Directories that appear whole or not at all: filled under a temporary name, flushed, renamed.

One that takes the place of another is renamed in two steps, and a kill between them leaves `.<name>.former`
alone: the next command that writes the directory puts it back (`put_back_former`), and until then a reader is
told of it (`former_of`). What has a successor is renamed into `.<name>.gone` before it is removed, and never
put back: a file server may keep some of its files for as long as somebody has them open. The renames are made
under the claim `.<name>.claim`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from mlpmem_ds.core.claims import ClaimWatch, claim
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import flush
from mlpmem_ds.core.temporaries import (
    remove_stale_directories,
    remove_stale_temporaries,
    work_path,
    written_bytes,
)

_SECONDS_BETWEEN_LOOKS = 0.2
_PARTIAL = ".partial"

_logger = logging.getLogger(__name__)


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
    for folder, _, names in os.walk(filled, topdown=False):
        for name in names:
            flush(Path(folder, name))
        flush(Path(folder))
    with _alone(path):
        _put_back(path)
        if os.path.lexists(path):
            os.replace(path, former_of(path))
        try:
            os.replace(filled, path)
            flush(path.parent)
        finally:
            _put_back(path)


def refuse_mount(path: Path, *, flag: str) -> None:
    """Before the work for a directory that `replace_directory` will put there.

    Raises:
        UserError: a file system is mounted there, and nothing else can get its name.
    """
    if os.path.ismount(path):
        raise UserError(f"{flag} {path} is where a file system is mounted: give a directory in it")


def former_of(path: Path) -> Path:
    """Where the directory is while another takes its place."""
    return path.with_name(f".{path.name}.former")


def put_back_former(path: Path) -> None:
    """After a replacement that was cut off: the directory that `path` named before gets its name back where
    nothing has it, and is removed where its successor has."""
    if left_of_replacement(path):
        with _alone(path):
            _put_back(path)


def remove_former(path: Path) -> None:
    """What a replacement that was cut off has left is not put back any more; before `path` is removed."""
    if left_of_replacement(path):
        with _alone(path):
            _remove(path)


def left_of_replacement(path: Path) -> list[Path]:
    """What a replacement of `path` that was cut off, or is under way, has next to it: what was there before,
    and what is being removed."""
    return [left for left in (former_of(path), _gone(path)) if os.path.lexists(left)]


def _put_back(path: Path) -> None:
    if path.exists() or not former_of(path).exists():
        _remove(path)
    else:
        os.replace(former_of(path), path)
        flush(path.parent)


def _remove(path: Path) -> None:
    """What `path` named before; some of it may stay until the next call."""
    gone, former = _gone(path), former_of(path)
    if former.is_symlink():  # what it leads to stays
        former.unlink(missing_ok=True)
    elif former.exists():
        gone.mkdir(exist_ok=True)
        os.replace(former, tempfile.mkdtemp(dir=gone))
    shutil.rmtree(gone, ignore_errors=True)


def _gone(path: Path) -> Path:
    return path.with_name(f".{path.name}.gone")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process renames the directory meanwhile; one that does is waited for."""
    place, watch, has_said = path.with_name(f".{path.name}.claim"), ClaimWatch(), False
    while True:
        with claim(place, watch=watch) as is_mine:
            if is_mine:
                yield
                return
        if not has_said:
            _logger.info("waiting for %s: another process replaces %s", place, path)
            has_said = True
        time.sleep(_SECONDS_BETWEEN_LOOKS)


@contextlib.contextmanager
def work_directory(path: Path, *, continues: Callable[[Path], bool]) -> Iterator[Path]:
    """Give this process a directory next to `path`, named after it as temporary files are
    (core/temporaries.py) but `.partial`; it is removed at the end.

    What killed processes of this machine left under such names is removed first, and what other machines left
    and have not written to for an hour; but for one of this machine that `continues` accepts as the same
    work: it is taken over, without its half-written files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = work_path(path, _PARTIAL)
    for other in remove_stale_directories(path, _PARTIAL):
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


def bytes_of_stale_work(path: Path) -> int:
    """Bytes of the directories that killed processes of this machine have left next to `path`.
    `work_directory` goes on with one and removes the others, so the disk need not have these free."""
    if not path.parent.is_dir():
        return 0
    return sum(written_bytes(left, "") for left in remove_stale_directories(path, _PARTIAL))


def folders_with(root: Path, names: Collection[str]) -> Iterator[tuple[Path, frozenset[str]]]:
    """Each directory at or below `root` that has files of these names, and which: also behind a link to such
    a directory, for a stage may lie on another file system. Hidden ones below `root` are passed over.

    Raises:
        OSError: one cannot be read; it may be one of those that are looked for.
    """
    return _folders_with(root, frozenset(names), {root.resolve()})


def _folders_with(
    root: Path, names: frozenset[str], seen: set[Path]
) -> Iterator[tuple[Path, frozenset[str]]]:
    """`seen`: where the walks so far began, without links."""

    def complain(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # renamed or removed in this moment
            raise error

    for place, folders, files in os.walk(root, onerror=complain):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        if found := names.intersection(files):
            yield Path(place), found
        for link in (Path(place, folder) for folder in folders):
            if not link.is_symlink() or not any((link / name).is_file() for name in names):
                continue
            target = link.resolve()
            if not seen & {target, *target.parents}:
                seen.add(target)
                yield from _folders_with(link, names, seen)
