"""Ranks that start in a second: forks of a process on their host that has imported everything already.

A start differs from the real one by its imports alone (tests/launch/forked_launchers.py). What is rehearsed
is what happens between hosts; the real launchers are in test_launchers.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence

from .hosts import REPOSITORY, Host, Process
from .launchers import Start, variables

_PLACE = "/tmp/warm"
"""on the host: of the commands `python` and `torchrun` that fork"""
_SERVER = str(REPOSITORY / "tests" / "launch" / "forked_launchers.py")


class WarmHost:
    """A host with such a process, for one start of ranks at a time."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.start()

    def start(self) -> None:
        host = self.host
        place = host.folder / "tmp" / "warm"
        shutil.rmtree(place, ignore_errors=True)
        for name in ("python", "torchrun", "deepspeed"):  # no first start that is a real one
            (place / f"started-{name}").mkdir(parents=True)
        self._server = host.start([sys.executable, _SERVER, _PLACE], stdout=subprocess.PIPE)
        self._own = 0

    def wait(self) -> None:
        """Until it can start ranks."""
        assert self._server.stdout is not None and self._server.stdout.readline() == "ready\n"
        (self._own,) = (process.pid for process in self.host.processes() if _SERVER in process.words)

    def power_on(self) -> None:
        self.host.power_on()
        self.start()
        self.wait()

    def ranks(self) -> list[Process]:
        """The ranks that run on it."""
        return [one for one in self.host.processes() if _SERVER in one.words and one.pid != self._own]

    def others(self) -> list[Process]:
        """All that runs on it, apart from the process that is forked."""
        return [one for one in self.host.processes() if one.pid != self._own]

    def kill_ranks(self) -> None:
        for rank in self.ranks():
            rank.kill()


def warm(hosts: Sequence[Host]) -> list[WarmHost]:
    made = [WarmHost(host) for host in hosts]
    for host in made:
        host.wait()
    return made


def on_one_host(host: WarmHost, words: Sequence[str], ranks: int = 1) -> list[Start]:
    """Without a network; several ranks as torchrun starts them."""
    launcher = ["python"] if ranks == 1 else ["torchrun", "--standalone", "--nproc-per-node", str(ranks)]
    return [Start(host.host, [f"{_PLACE}/{launcher[0]}", *launcher[1:], *words])]


def on_each_host(hosts: Sequence[WarmHost], words: Sequence[str]) -> list[Start]:
    """A rank a host, which finds the others through its variables."""
    return variables([host.host for host in hosts], words, 1, python=f"{_PLACE}/python")
