"""Files that are being written: their names, and which of them no process will finish.

They are named `.<name>.<host>.<pid>.tmp` in the directory of their target. A later run on the same host can
tell those of dead processes. A host that was lost may never come back under its name (a container, a node of
a cluster): its files are given up when no process has written to them for an hour.

Age is measured between two times of one clock, the one that gives files of this folder their times: a host
whose own clock is wrong neither removes too early nor keeps for ever. A writer that is alive all the same,
such as a process that was stopped for an hour, finds its file gone and makes its unit once more
(core/stage_directory.py).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlpmem_ds.core.host import host_name, is_alive

SECONDS_UNTIL_GIVEN_UP = 3600.0
_SUFFIX = ".tmp"


def temporary_path(path: Path) -> Path:
    """Where this process writes what will be `path`."""
    return path.with_name(f".{path.name}.{host_name()}.{os.getpid()}{_SUFFIX}")


def is_own_temporary(name: object) -> bool:
    """Whether a file's name, of an error, is one that this process gave."""
    return isinstance(name, str) and name.endswith(f".{host_name()}.{os.getpid()}{_SUFFIX}")


def time_of_file_system(folder: Path) -> float:
    """Now, in seconds, by the clock that gives a new file in this folder its modification time."""
    with tempfile.TemporaryFile(dir=folder) as stream:
        return os.fstat(stream.fileno()).st_mtime


def remove_stale_temporaries(
    root: Path, *, seconds_until_given_up: float = SECONDS_UNTIL_GIVEN_UP, prefix: str = "."
) -> None:
    """Remove the temporary files below `root` that will not be finished.

    Args:
        root: a directory of the caller's own.
        seconds_until_given_up: without a write, for those of other hosts.
        prefix: of the names that are looked at.
    """
    now = time_of_file_system(root)
    # Not rglob, which fails where another rank removes a folder meanwhile.
    names = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    for path in names:
        if not (path.name.startswith(prefix) and path.suffix == _SUFFIX):
            continue
        pid = _pid_on_this_host(path.name, _SUFFIX)
        if not path.is_file():
            continue
        if is_stale(path, pid, now=now, seconds_until_given_up=seconds_until_given_up):
            path.unlink(missing_ok=True)


def _pid_on_this_host(name: str, suffix: str) -> int | None:
    """The process that a name ends with; None where it is one of another host, or none."""
    head, _, pid = name.removesuffix(suffix).rpartition(".")
    return int(pid) if pid.isdigit() and head.endswith(f".{host_name()}") else None


def is_stale(
    path: Path,
    pid: int | None,
    *,
    now: float,
    seconds_until_given_up: float = SECONDS_UNTIL_GIVEN_UP,
) -> bool:
    """Whether no process will finish a file, or a directory with all that is in it.

    Args:
        path: the file or directory.
        pid: of its process on this host; None where it is one of another host.
        now: as `time_of_file_system` gives it.
        seconds_until_given_up: without a write, for one of another host.
    """
    if pid is not None:
        return not is_alive(pid)
    return now - max(_times_of(path), default=now) > seconds_until_given_up


def _times_of(path: Path) -> Iterator[float]:
    """When it, and each file in it, was last written to."""
    inside = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    for each in (path, *inside):
        try:
            yield each.lstat().st_mtime
        except FileNotFoundError:  # renamed or removed in this moment
            continue


def remove_stale_directories(folder: Path, *, name: str, suffix: str) -> list[Path]:
    """Remove directories `.<name>.<host>.<pid><suffix>` of other hosts that will not be finished.

    Returns:
        those of processes of this host that have ended, or of this process; they are left to the caller.
    """
    now, own = time_of_file_system(folder), []
    for path in sorted(folder.iterdir()):
        if not (path.name.startswith(f".{name}.") and path.name.endswith(suffix) and path.is_dir()):
            continue
        pid = _pid_on_this_host(path.name, suffix)
        if pid == os.getpid() or is_stale(path, pid, now=now):
            if pid is not None:
                own.append(path)
            else:
                shutil.rmtree(path, ignore_errors=True)
    return own
