"""Which processes of this machine are alive, and the name by which those that see each other know it."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path

_START = 19  # of the fields of proc(5) from the third, the state, on
_INITIAL_PID_SPACE = 0xEFFFFFFC  # its inode in Linux, PROC_PID_INIT_INO


@functools.cache
def host_name() -> str:
    """This host's name; in a container with process ids of its own, `<name>-<number of that space>`.

    Two containers may have the same host name; a process id of one says nothing in the other.
    """
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # no Linux
        return socket.gethostname()
    return socket.gethostname() if space == _INITIAL_PID_SPACE else f"{socket.gethostname()}-{space}"


def is_alive(pid: int) -> bool:
    """Whether a process of this host runs; one that was killed and not yet reaped does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    fields = _fields_of(pid)
    return not fields or fields[0] != "Z"


def start_of(pid: int) -> str:
    """When a process of this host started, in clock ticks since the host did; "" where that is not known.

    Process ids are used again: with this one is the same process or another.
    """
    fields = _fields_of(pid)
    return fields[_START] if len(fields) > _START else ""


def process_has_ended(pid: int, start: str) -> bool:
    """Whether the process of this host that had this id and this `start_of` ("": not known) is gone."""
    return not is_alive(pid) or (start != "" and start_of(pid) not in ("", start))


def _fields_of(pid: int) -> list[str]:
    """What the system says of a process, from its state on; nothing without Linux, or where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()
    except OSError:
        return []
