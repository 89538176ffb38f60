"""Who is at a unit: a claim file next to the units' records, so that ranks that share only a file system
waste no work.

A claim is a courtesy, not a lock: units are pure functions and files are published whole, so two processes at
one unit do harm to nothing but time. That is why a claim may be broken as soon as its holder looks dead: on
this host by its process id, elsewhere when its file has not been touched for a minute (a thread of the holder
touches it).
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mlpmem_ds.core.files import is_alive

_SECONDS_BETWEEN_TOUCHES = 10.0
_SECONDS_UNTIL_DEAD = 60.0
_SECONDS_TO_WRITE = 5.0


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Hold the claim while the block runs, and remove it afterwards; gives False where another live process
    holds it."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        if is_held(path):
            yield False
            return
        descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
    stop = threading.Event()
    toucher = threading.Thread(target=_touch_until, args=(path, stop), daemon=True)
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(f"{socket.gethostname()} {os.getpid()}")
        toucher.start()
        yield True
    finally:
        stop.set()
        path.unlink(missing_ok=True)


def is_held(path: Path) -> bool:
    """Whether another live process holds this claim."""
    try:
        host, _, pid = path.read_text(encoding="utf-8").rpartition(" ")
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    if age > (_SECONDS_UNTIL_DEAD if pid else _SECONDS_TO_WRITE):
        return False
    if host == socket.gethostname() and pid.isdigit():
        return int(pid) != os.getpid() and is_alive(int(pid))
    return True  # another host's, or one that is being written


def remove_dead_claims(folder: Path) -> None:
    """Remove the claims in a folder that no process holds."""
    for path in folder.glob(".*.claim"):
        if not is_held(path):
            path.unlink(missing_ok=True)


def _touch_until(path: Path, stop: threading.Event) -> None:
    while not stop.wait(_SECONDS_BETWEEN_TOUCHES):
        with contextlib.suppress(
            OSError
        ):  # gone, or the file system is away: at worst somebody else makes the unit too
            os.utime(path)
