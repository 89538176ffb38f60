"""Claims: held by live processes, broken when their holder looks dead."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpmem_ds.core import claims
from mlpmem_ds.core.claims import claim, is_held, remove_dead_claims


@pytest.fixture
def stranger() -> Iterator[int]:
    """The id of another live process."""
    process = subprocess.Popen(["sleep", "60"])
    yield process.pid
    process.kill()
    process.wait()


def write(path: Path, host: str, pid: int | str, age: float = 0.0) -> None:
    path.write_text(f"{host} {pid}")
    os.utime(path, (time.time() - age, time.time() - age))


def test_a_claim_lasts_as_long_as_its_block(tmp_path: Path) -> None:
    path = tmp_path / ".3.claim"
    with claim(path) as is_mine:
        assert is_mine and path.read_text() == f"{socket.gethostname()} {os.getpid()}"
    assert not path.exists()
    with pytest.raises(RuntimeError), claim(path):
        raise RuntimeError
    assert not path.exists()


def test_a_live_process_keeps_its_claim(tmp_path: Path, stranger: int) -> None:
    path = tmp_path / ".3.claim"
    for host, pid in ((socket.gethostname(), stranger), ("elsewhere", 1)):
        write(path, host, pid)
        with claim(path) as is_mine:
            assert not is_mine
        assert path.exists()
    path.write_text("")  # being written
    assert is_held(path)


def test_the_claims_of_the_dead_are_broken_and_removed(tmp_path: Path, stranger: int) -> None:
    path, here = tmp_path / ".3.claim", socket.gethostname()
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # ended, not reaped
    for host, pid, age in ((here, zombie.pid, 0), (here, stranger, 61), ("elsewhere", 1, 61), ("", "", 6)):
        write(path, host, pid, age)
        with claim(path) as is_mine:
            assert is_mine
        write(path, host, pid, age)
        remove_dead_claims(tmp_path)
        assert not path.exists()
    zombie.wait()


def test_a_holder_touches_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_SECONDS_BETWEEN_TOUCHES", 0.01)
    path = tmp_path / ".3.claim"
    with claim(path):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert path.stat().st_mtime > 0
