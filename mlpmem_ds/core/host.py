"""This machine: its memory, which of its processes are alive, and the name by which those that see each other
know it."""

from __future__ import annotations

import functools
import os
import socket
from dataclasses import dataclass
from pathlib import Path

_START = 19  # of the fields of proc(5) from the third, the state, on
_INITIAL_PID_SPACE = 0xEFFFFFFC  # its inode in Linux, PROC_PID_INIT_INO
_DIGITS_OF_BOOT = 12


@dataclass(frozen=True)
class Process:
    """A process, as those that share a file system with it know it: its id alone says nothing to processes of
    another machine, to another container, or after a restart.

    Args:
        host: `host_name` of its machine. Two machines may have one name (images that fix it, clones).
        boot: `boot_id` of its machine, which no two machines share.
        pid: its id.
        start: `start_of` it; "" where that is not known.
    """

    host: str
    boot: str
    pid: int
    start: str

    @property
    def name(self) -> str:
        """For names of files of its own: `<host>.<boot>.<pid>-<start>`, without the start where it is not
        known."""
        return f"{self.host}.{self.boot}.{self.pid}-{self.start}".removesuffix("-")

    @property
    def is_of_this_machine(self) -> bool:
        """Whether it is, or was, one of those that this process sees."""
        return (self.host, self.boot) == (host_name(), boot_id())

    @property
    def has_ended(self) -> bool:
        """Whether it is known to be gone: only one of this machine ever is."""
        if not self.is_of_this_machine:
            return False
        return not is_alive(self.pid) or (self.start != "" and start_of(self.pid) not in ("", self.start))


def process_of(pid: int) -> Process:
    """The process of this machine that has this id now."""
    return Process(host_name(), boot_id(), pid, start_of(pid))


def this_process() -> Process:
    return process_of(os.getpid())


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


@functools.cache
def boot_id() -> str:
    """Of the running kernel: the first twelve digits of the number that it drew when it started; "-" where it
    does not say it."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
    except OSError:
        return "-"
    return text.strip().replace("-", "")[:_DIGITS_OF_BOOT] or "-"


def machine_id() -> str:
    """The same for the processes of one machine, which share its memory; two machines of one host name have
    two."""
    return f"{socket.gethostname()} {boot_id()}"


def host_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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


def _fields_of(pid: int) -> list[str]:
    """What the system says of a process, from its state on; nothing without Linux, or where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()
    except OSError:
        return []
