"""Claims: held by live processes, broken when their holder looks dead."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpmem_ds.core import claims
from mlpmem_ds.core.claims import (
    ClaimWatch,
    claim,
    claim_alone,
    has_ended,
    holder,
    is_held,
    remove_dead_claims,
)
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.host import host_name


@pytest.fixture
def stranger() -> Iterator[int]:
    """The id of another live process."""
    process = subprocess.Popen(["sleep", "60"])
    yield process.pid
    process.kill()
    process.wait()


class Clock:
    """The monotonic clock, which a test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(claims.time, "monotonic", lambda: self.now)


def test_a_claim_lasts_as_long_as_its_block(tmp_path: Path) -> None:
    path = tmp_path / ".3.claim"
    with claim(path) as is_mine:
        assert is_mine and path.read_text() == holder(os.getpid())
        assert path.read_text().split()[0] == host_name()
    assert not path.exists()
    with pytest.raises(RuntimeError), claim(path):
        raise RuntimeError
    assert not path.exists()


def test_a_live_process_keeps_its_claim(tmp_path: Path, stranger: int) -> None:
    path = tmp_path / ".3.claim"
    for text in (holder(stranger), "elsewhere - 1", ""):  # of this host, of another, being written
        path.write_text(text)
        os.utime(path, (0, 0))  # however old it looks by our clock
        with claim(path) as is_mine:
            assert not is_mine
        remove_dead_claims(tmp_path)
        assert path.exists() and is_held(path)


@pytest.mark.parametrize("lives", [True, False])
def test_what_is_for_one_process_is_refused_while_another_lives_also_on_another_host(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stranger: int,
    lives: bool,
) -> None:
    caplog.set_level("INFO")
    path, clock, slept = tmp_path / ".fetch.claim", Clock(monkeypatch), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds
        if lives and len(slept) == 10:
            os.utime(path, (7, 7))  # its holder's sign of life

    monkeypatch.setattr(claims.time, "sleep", sleep)
    path.write_text("elsewhere - 1")
    with contextlib.ExitStack() as held:
        if lives:
            with pytest.raises(UserError, match="wait for it"):
                held.enter_context(claim_alone(path, refusal="wait for it"))
            assert len(slept) == 10 and path.read_text() == "elsewhere - 1"
            path.write_text(holder(stranger))  # of this host: known at once
            with pytest.raises(UserError, match="wait for it"):
                held.enter_context(claim_alone(path, refusal="wait for it"))
            assert len(slept) == 10
        else:
            held.enter_context(claim_alone(path, refusal="wait for it"))
            assert 60 <= sum(slept) < 65 and path.read_text() == holder(os.getpid())
    assert caplog.text.count(f"waiting up to 60 s to see whether the process of {path} lives") == 1


def test_the_claims_of_ended_processes_are_broken_and_removed(tmp_path: Path) -> None:
    path = tmp_path / ".3.claim"
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # ended, not reaped
    path.write_text(holder(zombie.pid))
    with claim(path) as is_mine:
        assert is_mine
    path.write_text(holder(zombie.pid))
    remove_dead_claims(tmp_path)
    assert not path.exists()
    zombie.wait()


@pytest.mark.parametrize(
    "text",
    [
        "elsewhere - 1",
        f"{socket.gethostname()}-4026532001 - 1",
        f"{host_name()} 0123456789ab 1",
        f"{holder(1)} damaged",
    ],
)
def test_a_claim_that_was_not_touched_for_a_minute_of_our_clock_is_broken(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another host, of another container of this host with a process 1, or of another machine of its
    name; and one that is damaged."""
    clock, watch, path = Clock(monkeypatch), ClaimWatch(), tmp_path / ".3.claim"
    path.write_text(text)
    for ahead in (1e6, -1e6):  # a file server's clock is days off
        os.utime(path, (time.time() + ahead,) * 2)
        assert watch.look(path) in ("unknown", "held")
        clock.now += 59
        assert watch.look(path) == "unknown"
    os.utime(path, (time.time() + ahead + 1,) * 2)
    assert watch.look(path) == "held"
    clock.now += 61
    assert watch.look(path) == "gone"
    path.write_text("third - 3")  # taken over since that look
    with claim(path, watch=watch) as is_mine:
        assert not is_mine and path.read_text() == "third - 3"
    clock.now += 61
    with claim(path, watch=watch) as is_mine:
        assert is_mine and path.read_text() == holder(os.getpid())
    assert watch.look(path) == "gone"


def test_only_an_ended_process_of_this_machine_is_known_to_have_ended(stranger: int) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert has_ended(holder(gone.pid))
    assert not has_ended(holder(os.getpid()))
    assert not has_ended(holder(stranger))
    assert not has_ended(f"elsewhere {holder(gone.pid).partition(' ')[2]}")
    for damaged in ("", "a", "a b", "a b -1", "a b 1 2 3", f"{holder(gone.pid)}0x", "\ufffd" * 3):
        assert not has_ended(damaged)
    host, boot, pid, *_ = holder(gone.pid).split()
    assert not has_ended(f"{host} {boot} {pid}{10**20}")  # no process id
    assert not has_ended(f"{host} 0123456789ab {pid}")  # another machine of this host name
    words = holder(stranger).split()
    assert not has_ended(" ".join(words[:3]))  # of a system that does not say when a process started


def test_a_process_id_that_is_used_again_is_not_the_process_that_had_it(stranger: int) -> None:
    words = holder(stranger).split()
    if len(words) < 4:
        pytest.skip("this system does not say when a process started")
    assert has_ended(" ".join([*words[:3], str(int(words[3]) + 1)]))


def test_a_holder_touches_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_SECONDS_BETWEEN_TOUCHES", 0.01)
    path = tmp_path / ".3.claim"
    with claim(path):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert path.stat().st_mtime > 0


def test_a_claim_that_stays_empty_is_broken_after_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, clock, watch = tmp_path / ".3.claim", Clock(monkeypatch), ClaimWatch()
    path.touch()  # its process was killed before it wrote its name
    assert watch.look(path) == "unknown"
    clock.now += 4
    assert watch.look(path) == "unknown"
    clock.now += 2
    with claim(path, watch=watch) as is_mine:
        assert is_mine and path.read_text(encoding="utf-8") == holder(os.getpid())


def dead() -> str:
    """The claim of a process that has ended."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    return holder(gone.pid)


def test_a_claim_that_another_has_taken_over_is_neither_broken_nor_removed(
    tmp_path: Path, stranger: int
) -> None:
    path = tmp_path / ".3.claim"

    class Slow(ClaimWatch):
        """Another process breaks the claim right after this one's look."""

        def look(self, path: Path) -> claims.State:
            state = super().look(path)
            if state == "gone":
                path.unlink()
                path.write_text(holder(stranger))
            return state

    path.write_text(dead())
    with claim(path, watch=Slow()) as is_mine:
        assert not is_mine and path.read_text() == holder(stranger)
    path.unlink()
    with claim(path) as is_mine:
        assert is_mine
        path.write_text(holder(stranger))  # this process was taken for dead
    assert path.read_text() == holder(stranger)


def test_a_claim_is_removed_after_the_moment_in_which_another_process_looks_at_it(tmp_path: Path) -> None:
    path = tmp_path / ".3.claim"
    with contextlib.ExitStack() as looking:
        with claim(path):
            stream = looking.enter_context(open(path))
            fcntl.flock(stream, fcntl.LOCK_EX)
            threading.Timer(0.1, looking.close).start()
        assert not path.exists()


def test_a_full_disk_leaves_no_claim_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(claims.os, "write", refuse)
    with pytest.raises(OSError, match=r"No space left.*/\.3\.claim"), claim(tmp_path / ".3.claim"):
        pass
    assert list(tmp_path.iterdir()) == []


ROUNDS, PROCESSES = 60, 3
OF_ONE_PROCESS = f"""
import contextlib, os, sys, time
from pathlib import Path
from mlpmem_ds.core.claims import claim
path, dead, rounds = Path(sys.argv[1]), sys.argv[2], 0
print("ready", flush=True)
sys.stdin.readline()
while rounds < {ROUNDS}:
    with claim(path) as is_mine:
        if not is_mine:
            continue
        os.close(os.open(path.with_name("inside"), os.O_CREAT | os.O_EXCL))  # fails where two are inside
        os.sched_yield()
        os.unlink(path.with_name("inside"))
        rounds += 1
        path.write_text(dead)  # as if it were killed here: the next one breaks its claim
"""


def test_of_processes_that_break_a_dead_claim_one_gets_it(tmp_path: Path) -> None:
    path, text = tmp_path / ".fetch.claim", dead()
    path.write_text(text)
    command = [sys.executable, "-c", OF_ONE_PROCESS, str(path), text]
    with contextlib.ExitStack() as running:
        processes = [
            running.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(PROCESSES)
        ]
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [process.wait(timeout=120) for process in processes] == [0] * PROCESSES
