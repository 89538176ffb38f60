"""Ranks that start in a second: forks of a process on their host that has imported everything already.

A start differs from the real one by its imports alone (tests/warm_server.py). What is rehearsed is what
happens between hosts; the real launchers are in test_launchers.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from .hosts import REPOSITORY, Host, Process
from .launchers import Start, variables

_PLACE = "/tmp/warm"
"""on the host: of the commands `python` and `torchrun` that fork"""
_SERVER = f"""
import multiprocessing, pathlib, sys
sys.path.insert(0, {str(REPOSITORY / "tests")!r})
import warm_start, warm_server
serve = multiprocessing.get_context("fork").Process(
    target=warm_server.serve, args=(pathlib.Path({_PLACE!r}),)
)
serve.start()
serve.join()
"""
_SECONDS_OF_IMPORTS = 120.0


class WarmHost:
    """A host with such a process."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.start()

    def start(self) -> None:
        self._place = self.host.folder / "tmp" / "warm"
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir()
        self._own: set[int] = set()
        self._server = self.host.start([sys.executable, "-c", _SERVER], stdin=subprocess.DEVNULL)

    def wait(self) -> None:
        """Until it can start ranks."""
        deadline = time.monotonic() + _SECONDS_OF_IMPORTS
        while not (self._place / "ready").exists():
            assert self._server.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        self._own = {process.pid for process in self.host.processes()}

    def power_on(self) -> None:
        self.host.power_on()
        self.start()
        self.wait()

    def ranks(self) -> list[Process]:
        """The ranks that run on it, and the processes that wait for them."""
        return [one for one in self.others() if _SERVER in one.words]

    def others(self) -> list[Process]:
        """All that runs on it, apart from what is forked."""
        return [one for one in self.host.processes() if one.pid not in self._own]

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
