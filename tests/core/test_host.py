"""Which processes are alive, and a name that two containers of one host do not share."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from mlpmem_ds.core import host


@pytest.fixture(autouse=True)
def no_cache() -> Iterator[None]:
    host.host_name.cache_clear()
    yield
    host.host_name.cache_clear()


def test_a_process_that_ended_is_not_alive() -> None:
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # ended, not reaped
    assert not host.is_alive(zombie.pid)
    zombie.wait()
    assert not host.is_alive(zombie.pid) and host.is_alive(os.getpid())


def test_a_process_id_that_is_used_again_is_not_the_process_that_had_it() -> None:
    own, start = os.getpid(), host.start_of(os.getpid())
    if not start:
        pytest.skip("this system does not say when a process started")
    assert not host.process_has_ended(own, start) and not host.process_has_ended(own, "")
    assert host.process_has_ended(own, str(int(start) + 1))


@pytest.mark.parametrize(("space", "suffix"), [(0xEFFFFFFC, ""), (4026532001, "-4026532001")])
def test_a_container_with_process_ids_of_its_own_has_a_name_of_its_own(
    space: int, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = os.stat_result((0, space, 0, 0, 0, 0, 0, 0, 0, 0))
    monkeypatch.setattr(host.os, "stat", lambda path: result)
    assert host.host_name() == socket.gethostname() + suffix
