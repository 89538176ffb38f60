"""Files that are being written: their names, and which of them no process will finish.

They are named `.<name>.<host>.<boot>.<pid>-<start>.tmp` in the directory of their target, after the process
that writes them (core/host.py), which is judged as the holder of a claim is (core/claims.py): a later run on
the same machine can tell those of dead processes, also where another process has such an id now. Of other
machines, one of the same host name among them, and of this one before its last restart, nothing is known but
when they last wrote; a host that was lost may never come back under its name (a container, a node of a
cluster). Their files are given up when no process has written to them for an hour.

Age is measured between two times of one clock, the one that gives files of this folder their times: a host
whose own clock is wrong neither removes too early nor keeps for ever. A writer that is alive all the same,
such as a process that was stopped for an hour, finds its file gone and makes its unit once more
(core/stage_directory.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlpmem_ds.core import host
from mlpmem_ds.core.host import Process, this_process

SECONDS_UNTIL_GIVEN_UP = 3600.0
_SUFFIX = ".tmp"
_PROCESS = re.compile(r"(?P<head>.+)\.(?P<boot>[0-9a-f]+|-)\.(?P<pid>[0-9]{1,9})(-(?P<start>[0-9]+))?")


def temporary_path(path: Path) -> Path:
    """Where this process writes what will be `path`."""
    return path.with_name(f".{path.name}.{this_process().name}{_SUFFIX}")


def work_path(path: Path, suffix: str) -> Path:
    """The directory, named in the same way, where this process makes what will be the directory `path`."""
    return path.with_name(f".{path.name}.{this_process().name}{suffix}")


def written_bytes(root: Path, suffix: str) -> int:
    """What a disk need not have free to write the files of a directory, because it lies there: bytes of those
    whose names end with `suffix`, and of their temporary files. These become whole, or are removed before
    their unit is made again. Records are not looked at; without the directory it is 0.
    """
    found = 0
    for folder, folders, names in os.walk(root):  # other ranks may rename and remove meanwhile
        if Path(folder) == root and "done" in folders:
            folders.remove("done")
        for name in names:
            if name.endswith(suffix) or (name.endswith(_SUFFIX) and f"{suffix}." in name):
                with contextlib.suppress(FileNotFoundError):
                    found += os.stat(os.path.join(folder, name)).st_size
    return found


def is_own_temporary(name: object) -> bool:
    """Whether a file's name, of an error, is one that this process gave."""
    return isinstance(name, str) and name.endswith(f".{this_process().name}{_SUFFIX}")


def time_of_file_system(folder: Path) -> float:
    """Now, in seconds, by the clock that gives a new file in this folder its modification time."""
    with tempfile.TemporaryFile(dir=folder) as stream:
        return os.fstat(stream.fileno()).st_mtime


def remove_stale_temporaries(root: Path, *, seconds_until_given_up: float = SECONDS_UNTIL_GIVEN_UP) -> None:
    """Remove the temporary files below `root` that will not be finished.

    Args:
        root: a directory of the caller's own.
        seconds_until_given_up: without a write, for those of other machines.
    """
    # Not rglob, which fails where another rank removes a folder meanwhile.
    paths = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    _remove_stale(paths, now=time_of_file_system(root), seconds_until_given_up=seconds_until_given_up)


def remove_stale_temporaries_of(path: Path) -> None:
    """Remove the temporary files of `path`, next to it, that will not be finished."""
    own = (other for other in path.parent.iterdir() if other.name.startswith(f".{path.name}."))
    _remove_stale(own, now=time_of_file_system(path.parent), seconds_until_given_up=SECONDS_UNTIL_GIVEN_UP)


def _remove_stale(paths: Iterable[Path], *, now: float, seconds_until_given_up: float) -> None:
    for path in paths:
        if not (path.name.startswith(".") and path.suffix == _SUFFIX and path.is_file()):
            continue
        has_ended = _has_ended(path.name, _SUFFIX)
        if has_ended is None:
            has_ended = is_given_up(path, now=now, seconds=seconds_until_given_up)
        if has_ended:
            path.unlink(missing_ok=True)


def _has_ended(name: str, suffix: str) -> bool | None:
    """Whether the process that a name ends with is gone; None where it is one of another machine, or none."""
    parts, own = _PROCESS.fullmatch(name.removesuffix(suffix)), host.host_name()
    # A host's name may have dots, and so may the file's: this host's is looked for, not read.
    if parts is None or not parts["head"].endswith(f".{own}"):
        return None
    process = Process(own, parts["boot"], int(parts["pid"]), parts["start"] or "")
    return process.has_ended if process.is_of_this_machine else None


def is_given_up(path: Path, *, now: float, seconds: float = SECONDS_UNTIL_GIVEN_UP) -> bool:
    """Whether no process has written for so long to a file, or to a directory with all that is in it.

    Args:
        path: the file or directory.
        now: as `time_of_file_system` gives it.
        seconds: without a write.
    """
    return now - max(_times_of(path), default=now) > seconds


def _times_of(path: Path) -> Iterator[float]:
    """When it, and each file in it, was last written to."""
    inside = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    for each in (path, *inside):
        try:
            yield each.lstat().st_mtime
        except FileNotFoundError:  # renamed or removed in this moment
            continue


def remove_stale_directories(path: Path, suffix: str) -> list[Path]:
    """Remove the directories that processes of other machines have named by `work_path` and will not finish.

    Returns:
        those of processes of this machine that have ended, and of this process; they are left to the caller.
    """
    now, own = time_of_file_system(path.parent), []
    for other in sorted(path.parent.iterdir()):
        if not (other.name.startswith(f".{path.name}.") and other.name.endswith(suffix) and other.is_dir()):
            continue
        has_ended = _has_ended(other.name, suffix)
        if has_ended or other == work_path(path, suffix):
            own.append(other)
        elif has_ended is None and is_given_up(other, now=now):
            shutil.rmtree(other, ignore_errors=True)
    return own
