"""Who is at a unit: a claim file next to the units' records, so that ranks that share only a file system
waste no work.

A claim is a courtesy, not a lock: units are pure functions and files are published whole, so two processes at
one unit do harm to nothing but time. That is why a claim may be broken as soon as its holder looks dead:

- on this machine by its process id and the time when it started (ids are used again), where both see the same
  processes (the same boot, the same space of process ids: two containers on one host may both have a process
  1);
- elsewhere when its file has not been touched for a minute (a thread of the holder touches it every ten
  seconds). The minute is measured by the observer's own monotonic clock between two looks at the file's
  time: clocks of other machines and of file servers are never compared with ours.

A claim is broken, and removed, under a lock of its file that is held for a moment: of several processes that
find a holder dead one alone takes its claim over, and a holder that was taken for dead does not remove the
claim of the next. A file system without such locks leaves the courtesy.

A claim file is opened before its time is asked: opening is what makes an NFS client ask the server, where a
stat alone may be answered from its memory for a minute.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.host import Process, process_of

_logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_TOUCHES = 10.0
_SECONDS_UNTIL_DEAD = 60.0
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_WITHOUT_A_NAME = 5.0
"""a claim that stays empty: its process was killed between the two system calls that make and fill it"""
_SECONDS_FOR_A_LOCK = 2.0
"""to remove a claim; whoever breaks one holds the lock of its file for milliseconds"""

_HOLDER = re.compile(r"(\S+) (\S+) ([0-9]{1,9})(?: ([0-9]+))?")

State = Literal["held", "unknown", "gone"]
"""of a claim: its holder is alive; it may be (nothing moved yet); it is not"""


@contextlib.contextmanager
def claim(path: Path, *, watch: ClaimWatch | None = None) -> Iterator[bool]:
    """Hold the claim while the block runs, and remove it afterwards; gives False where another process holds
    it.

    Args:
        path: of the claim file.
        watch: of a caller that asks again and again: looks once more, right before the claim is broken.
    """
    text = holder(os.getpid())  # beforehand: a claim that is left empty holds the others up
    if not _is_made(path, text):
        looker = watch or ClaimWatch()
        is_free = looker.look(path) == "gone" and _remove_if(path, lambda: looker.look(path) == "gone")
        if not (is_free and _is_made(path, text)):
            yield False
            return
    stop = threading.Event()
    toucher = threading.Thread(target=_touch_until, args=(path, stop), daemon=True)
    try:
        toucher.start()
        yield True
    finally:
        stop.set()
        _release(path, text)


@contextlib.contextmanager
def claim_alone(path: Path, *, refusal: str) -> Iterator[None]:
    """Hold a claim that is no courtesy: the block is for one process at a time. Whether a holder on another
    host lives shows within a minute, which is waited for.

    Args:
        path: of the claim file.
        refusal: what the user is told, with the remedy.

    Raises:
        UserError: a live process holds it.
    """
    watch, is_said = ClaimWatch(), False
    while watch.look(path) != "held":
        with claim(path, watch=watch) as is_mine:
            if is_mine:
                yield
                return
        if not is_said:
            seconds = _SECONDS_UNTIL_DEAD
            _logger.info("waiting up to %.0f s to see whether the process of %s lives", seconds, path)
            is_said = True
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    raise UserError(refusal)


def holder(pid: int) -> str:
    """What a claim of this process of this machine says: `<host> <boot> <pid> <start>`, without the start
    where the system does not say it."""
    process = process_of(pid)
    return f"{process.host} {process.boot} {process.pid} {process.start}".rstrip()


def _process_in(text: str) -> Process | None:
    """The process that `holder` named; None where the text is damaged, or not yet written."""
    words = _HOLDER.fullmatch(text)
    return None if words is None else Process(words[1], words[2], int(words[3]), words[4] or "")


def has_ended(text: str) -> bool:
    """Whether the process that `holder` named is known to be gone: only one of this machine is."""
    process = _process_in(text)
    return process is not None and process.has_ended


def is_of_this_machine(text: str) -> bool:
    """Whether the process that `holder` named is, or was, one of those that this process sees."""
    process = _process_in(text)
    return process is not None and process.is_of_this_machine


def is_held(path: Path) -> bool:
    """Whether another process may hold this claim, by one look: only a process of this machine is known to be
    gone at once."""
    return ClaimWatch().look(path) != "gone"


def _is_gone(path: Path) -> bool:
    return not is_held(path)


class ClaimWatch:
    """Looks at claims again and again, and tells which of their holders are gone."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[str, int, float]] = {}

    def look(self, path: Path) -> State:
        """One open and one fstat of the claim."""
        try:
            with open(path, encoding="utf-8", errors="replace") as stream:
                text, touched = stream.read(), os.fstat(stream.fileno()).st_mtime_ns
        except FileNotFoundError:
            return "gone"
        process = _process_in(text)
        if process is not None and process.is_of_this_machine:
            return "gone" if process.pid == os.getpid() or process.has_ended else "held"
        former = self._seen.get(path)
        if former is None or former[:2] != (text, touched):
            self._seen[path] = (text, touched, time.monotonic())
            return "unknown" if former is None else "held"
        patience = _SECONDS_UNTIL_DEAD if text else _SECONDS_WITHOUT_A_NAME
        return "gone" if time.monotonic() - former[2] > patience else "unknown"


def remove_dead_claims(folder: Path) -> None:
    """Remove the claims in a folder whose processes on this machine have ended."""
    for path in folder.glob(".*.claim"):
        if _is_gone(path):
            _remove_if(path, functools.partial(_is_gone, path))


def _is_made(path: Path, text: str) -> bool:
    """Whether this process has made a claim; False where there is one."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, text.encode())
    except OSError as error:  # a full disk, which knows no name
        path.unlink(missing_ok=True)
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)
    return True


def _release(path: Path, text: str) -> None:
    """Remove this process's claim, but not one of another process that has taken it for dead meanwhile."""
    deadline = time.monotonic() + _SECONDS_FOR_A_LOCK
    while not _remove_if(path, lambda: _text_of(path) == text):
        if time.monotonic() > deadline:
            path.unlink(missing_ok=True)
            return
        time.sleep(0.01)


def _remove_if(path: Path, holds: Callable[[], bool]) -> bool:
    """Remove a claim of which something still holds when this process has the lock of its file; False where
    another process has that."""
    try:
        descriptor = _opened(path)
    except FileNotFoundError:
        return True
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        if _is_same_file(path, descriptor) and holds():
            path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR)  # NFS locks no file that is open to be read only
    except PermissionError:  # another user's
        return os.open(path, os.O_RDONLY)


def _is_same_file(path: Path, descriptor: int) -> bool:
    """Whether a path still names an open file, and no other one."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _text_of(path: Path) -> str:
    """What a claim says; nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _touch_until(path: Path, stop: threading.Event) -> None:
    while not stop.wait(_SECONDS_BETWEEN_TOUCHES):
        with contextlib.suppress(
            OSError
        ):  # gone, or the file system is away: at worst somebody else makes the unit too
            os.utime(path)
