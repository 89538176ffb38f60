"""A process that does not get to its SIGTERM is ended by a thread; children are left alone."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import pytest

from mlpmem_ds.core.termination import Terminated, terminated_by_sigterm

ROOT = Path(__file__).parents[2]
BUSY = """
import ctypes, os, signal, threading
from mlpmem_ds.core import termination
termination.SECONDS_TO_ANSWER = 0.2
with termination.terminated_by_sigterm():
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(mutex)  # waits for ever; signals do not end it
"""


def test_raised_once_and_given_back() -> None:
    for _ in range(2):
        with pytest.raises(Terminated), terminated_by_sigterm(), terminated_by_sigterm():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1


def test_who_takes_or_ignores_it_already_keeps_it() -> None:
    taken: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        taken.append(number)

    for own in (take, signal.SIG_IGN):
        former = signal.signal(signal.SIGTERM, own)
        try:
            with terminated_by_sigterm():
                signal.raise_signal(signal.SIGTERM)
                assert signal.getsignal(signal.SIGTERM) is own
            assert signal.getsignal(signal.SIGTERM) is own
        finally:
            signal.signal(signal.SIGTERM, former)
    assert taken == [signal.SIGTERM]


def test_another_thread_than_the_main_one_changes_nothing() -> None:
    """Python lets the main thread alone set a handler."""

    def enter() -> object:
        with terminated_by_sigterm():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(enter).result() is signal.SIG_DFL


def test_a_child_dies_of_it_and_its_parent_lives() -> None:
    with terminated_by_sigterm():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_library_that_does_not_return_is_no_excuse() -> None:
    done = subprocess.run([sys.executable, "-c", BUSY], cwd=ROOT, capture_output=True, timeout=30)
    assert done.returncode == 143 and b"stopped by SIGTERM" in done.stderr
