"""Which processes are alive, and a name that two containers of one host do not share."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mlpmem_ds.core import host


@pytest.fixture(autouse=True)
def no_cache() -> Iterator[None]:
    for known in (host.host_name, host.boot_id):
        known.cache_clear()
    yield
    for known in (host.host_name, host.boot_id):
        known.cache_clear()


@pytest.fixture
def ended() -> host.Process:
    """A process of this machine that is gone."""
    process = subprocess.Popen(["true"])
    known = host.process_of(process.pid)
    process.wait()
    return known


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
    this = host.this_process()
    assert this == host.process_of(own) and this.start == start
    assert not this.has_ended and not replace(this, start="").has_ended
    assert replace(this, start=str(int(start) + 1)).has_ended


@pytest.mark.parametrize(
    "other",
    [
        {"boot": "0123456789ab"},  # another machine of this host name, or this one before its restart
        {"boot": "-"},
        {"host": "elsewhere"},
        {"host": f"{socket.gethostname()}-4026532001"},  # another container, with a process of this id
    ],
)
def test_no_process_that_this_one_does_not_see_is_known_to_have_ended(
    ended: host.Process, other: dict[str, str]
) -> None:
    assert ended.is_of_this_machine and ended.has_ended
    elsewhere = replace(ended, **other)
    assert not elsewhere.is_of_this_machine and not elsewhere.has_ended
    assert elsewhere.name != ended.name


def test_a_name_says_which_process_it_is() -> None:
    process = host.Process("n7.cluster", "0123456789ab", 12, "345")
    assert process.name == "n7.cluster.0123456789ab.12-345"
    assert replace(process, start="").name == "n7.cluster.0123456789ab.12"


def test_two_machines_of_one_host_name_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    first = host.machine_id()
    assert first == host.machine_id()
    monkeypatch.setattr(host, "boot_id", lambda: "0123456789ab")
    assert host.machine_id() != first and host.machine_id().startswith(socket.gethostname())


def test_the_boot_is_the_one_that_the_kernel_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        host.Path, "read_text", lambda path, encoding: "587c1c52-b4c7-4d77-8fd6-800b18f5f4ab\n"
    )
    assert host.boot_id() == "587c1c52b4c7"
    host.boot_id.cache_clear()

    def unknown(path: Path, encoding: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(host.Path, "read_text", unknown)
    assert host.boot_id() == "-"


@pytest.mark.parametrize(("space", "suffix"), [(0xEFFFFFFC, ""), (4026532001, "-4026532001")])
def test_a_container_with_process_ids_of_its_own_has_a_name_of_its_own(
    space: int, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = os.stat_result((0, space, 0, 0, 0, 0, 0, 0, 0, 0))
    monkeypatch.setattr(host.os, "stat", lambda path: result)
    assert host.host_name() == socket.gethostname() + suffix
